"""Adapters made part of the weights that they stand beside, on the devices. L layers, U rank."""

import functools

import jax
from flax import nnx
from jax.sharding import Mesh

from llama_jax.models.init import abstract_model
from llama_jax.models.llama import Llama
from llama_jax.models.lora import (
    ADAPTER_ENDINGS,
    DORA_SCALE,
    LORA_A,
    LORA_B,
    merged_weight,
    num_inputs,
)


def merged(model: Llama, mesh: Mesh) -> Llama:
    """The model without adapters that computes the same, up to rounding in the weights' dtype.

    What has no adapter is shared with `model`, not copied; `model` itself where it has none.

    Args:
      model: as training has it, with stacked layers.
      mesh: where its parameters are.
    """
    if model.adapter is None:
        return model
    graphdef, _ = abstract_model(model.config, model.execution, mesh)
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    params = []
    with jax.set_mesh(mesh):
        for path, leaf in leaves.items():
            *parents, name = path
            if str(name).endswith(ADAPTER_ENDINGS):
                continue
            factors = [leaves.get((*parents, f"{name}{end}")) for end in (LORA_A, LORA_B)]
            if factors[0] is not None:
                scale = leaves.get((*parents, f"{name}{DORA_SCALE}"))
                arrays = [None if x is None else x[...] for x in (leaf, *factors, scale)]
                leaf = leaf.replace(
                    _merge(*arrays, inputs=num_inputs(str(name)), scale=model.adapter.scale)
                )
            params.append((path, leaf))
        return nnx.merge(graphdef, nnx.from_flat_state(params))


@functools.partial(jax.jit, static_argnames=("inputs", "scale"))
def _merge(
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    dora_scale: jax.Array | None,
    *,
    inputs: int,
    scale: float,
) -> jax.Array:
    """Stacked weights, a layer at a time: one layer's product in float32 is there at once."""

    def one(layer: tuple[jax.Array, ...]) -> jax.Array:
        w, a, b, *scales = layer
        whole = merged_weight(w, a, b, scales[0] if scales else None, inputs, scale)
        return whole.astype(w.dtype)

    return jax.lax.map(one, (w, a, b) if dora_scale is None else (w, a, b, dora_scale))
