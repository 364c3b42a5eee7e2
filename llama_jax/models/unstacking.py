"""A model as generation runs it: parameters in the compute dtype, layers stacked or one by one.

Stacked layers compile to one body whatever their number, which TPUs want. On a CPU a scan copies
each layer's slice out of the stack in every step, as many bytes as the step reads at all: there
the layers stand apart, and on one device each matrix is cut into pieces (`split_matrix`).
"""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.models.llama import Llama
from llama_jax.models.merging import merged
from llama_jax.models.split_matrix import split


def for_generation(model: Llama, mesh: Mesh, *, stacked: bool) -> Llama:
    """The same model, cast to its compute dtype, its layers as asked for, adapters merged.

    Arrays that need no change are shared with `model`, not copied. On one CPU device, unstacked,
    vectors are views of `model`'s and projections are copied, turned to [out, in].

    Args:
      model: as training has it, with stacked layers.
      mesh: where its parameters are.
      stacked: keep the layers stacked.
    """
    model = merged(model, mesh)
    dtype = model.execution.compute_dtype
    execution = dataclasses.replace(model.execution, param_dtype=dtype, scan_layers=stacked)
    graphdef, state = nnx.split(model)
    with jax.set_mesh(mesh):
        made: Llama = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))
        made.execution = execution
        if not stacked:
            made.layers = nnx.List(_apart(made, mesh))  # type: ignore[assignment]
        if not stacked and _on_one_cpu_device(mesh):
            _split_matrices(made, mesh)
    return made


def _on_one_cpu_device(mesh: Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def _split_matrices(model: Llama, mesh: Mesh) -> None:
    """Put a `SplitMatrix` in place of each matrix: embedding, head and all projections."""

    def put(piece: np.ndarray) -> jax.Array:
        return jax.device_put(piece, NamedSharding(mesh, P(None, None)), may_alias=True)

    for path, param in nnx.to_flat_state(nnx.state(model)):
        name = str(path[-1])
        if name == "embedding" or name == "lm_head" or name.endswith("_proj"):
            inputs = {"embedding": 0, "o_proj": 2}.get(name, 1)
            param.set_value(split(np.asarray(param[...]), inputs, put))


def _apart(model: Llama, mesh: Mesh) -> list[nnx.Module]:
    graphdef, stack = nnx.split(model.layers)
    leaves, treedef = jax.tree.flatten(stack)
    parts = [_parts(leaf, mesh) for leaf in leaves]
    return [
        nnx.merge(graphdef, jax.tree.unflatten(treedef, part)) for part in zip(*parts, strict=True)
    ]


def _parts(stack: jax.Array, mesh: Mesh) -> list[jax.Array]:
    """Each element along the first dim; views where the stack is on one CPU device."""
    count = stack.shape[0]
    if not _on_one_cpu_device(mesh):
        return list(jax.jit(lambda x: [x[i] for i in range(count)])(stack))
    whole, layout = np.asarray(stack), NamedSharding(mesh, P(*jax.typeof(stack).sharding.spec[1:]))
    return [jax.device_put(whole[i], layout, may_alias=True) for i in range(count)]
