"""The one table from logical dims to mesh axes, and the few operations that need it.

Models, kernels and losses say dims (`embed`, `q_heads`, `batch`); only this package says axes.
Everything works on the mesh set by `jax.set_mesh`, and also with none set (plain local arrays).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config.loading import ConfigError

Axes = str | tuple[str, ...] | None
Dims = tuple[str | None, ...]

# Layout of arrays in use: activations, and weights once gathered.
RULES: dict[str, Axes] = {
    "batch": ("data", "fsdp"),
    "length": "context",
    # The residual stream and its norms, which no head or column splits: Megatron's sequence
    # parallelism (arXiv 2205.05198). Gathered over tensor before a layer's products.
    "residual_length": ("context", "tensor"),
    "key_length": None,  # keys and values are gathered over the context axis for attention
    "embed": None,
    "mlp": "tensor",
    "q_heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    # The head's columns where the loss gathers tokens instead of the head.
    "loss_vocab": ("tensor", "fsdp"),
    "stored_embed": "fsdp",  # the columns of an embedding that is used as it is stored
    "layers": None,
    "norm": None,  # norm scales, biases of D: too small for gathering to pay
}
# Parameters, their gradients and optimizer moments are stored with these on top.
STORED: dict[str, Axes] = {**RULES, "embed": "fsdp"}
# Dims that lie as another one (None: replicated), not refused, when their axes don't divide them.
# A model with 8 key-value heads on a 16-way tensor axis keeps whole heads on every device; a row
# of one token, as when generating, keeps its residual on every device of the tensor axis.
OTHERWISE: dict[str, str | None] = {
    "kv_heads": None,
    "residual_length": "length",
    "loss_vocab": "vocab",
}


def current_mesh() -> AbstractMesh:
    """The mesh of `jax.set_mesh`; `.empty` when none is set."""
    return jax.sharding.get_abstract_mesh()


def platform() -> str:
    """ "tpu", "gpu" or "cpu": of the current mesh's devices, there or described, or JAX's own."""
    device = current_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def axis_size(dim: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Over how many shards a dim in use is split on the mesh (default: the current one)."""
    return _ways(RULES[dim], current_mesh() if mesh is None else mesh)


def param_spec(dims: Dims, shape: Sequence[int], mesh: Mesh | AbstractMesh, name: str) -> P:
    """How a parameter is stored.

    Args:
      dims: one logical dim for each of the shape's.
      name: the parameter's name, for messages.

    Raises:
      ConfigError: a dim that its axis doesn't divide, with sizes of the axis that would fit.
    """
    return _spec(STORED, dims, shape, mesh, name)


def act_spec(dims: Dims, shape: Sequence[int], name: str = "activation") -> P:
    """How an activation, or a gathered weight, lies on the current mesh. Errors as `param_spec`."""
    return _spec(RULES, dims, shape, current_mesh(), name)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of the [B, T] arrays of a batch."""
    return NamedSharding(mesh, P(RULES["batch"], RULES["length"]))


def out_spec(dims: Dims, shape: Sequence[int]) -> P | None:
    """For `out_sharding` arguments: the spec, or None when no mesh is set."""
    return None if _local(current_mesh()) else act_spec(dims, shape)


def lay_out(x: jax.Array, dims: Dims, name: str = "activation") -> jax.Array:
    """`x` moved to the layout in use of its dims; the identity where no mesh is set."""
    if _local(current_mesh()):
        return x
    return jax.sharding.reshard(x, act_spec(dims, x.shape, name))


def at_use(w: jax.Array, dims: Dims) -> jax.Array:
    """A stored parameter gathered over fsdp for computing; cast it first, to move fewer bytes."""
    return lay_out(w, dims, "parameter")


def on_shards(
    function: Callable[..., Any],
    in_dims: Sequence[Dims],
    out_dims: Dims,
    *,
    check_types: bool = True,
) -> Callable[..., Any]:
    """`function` run on each device's shards (`jax.shard_map`), laid out by dims.

    Inside it arrays are local: no explicit axes, any reshape. Arguments are moved to the layout
    of their dims first. With no mesh set it is `function` itself.

    Args:
      check_types: whether JAX checks over which axes the outputs vary; what holds a Pallas kernel
        can't be checked.
    """

    def call(*arrays: jax.Array) -> Any:
        if _local(current_mesh()):
            return function(*arrays)
        specs = tuple(act_spec(dims, x.shape) for dims, x in zip(in_dims, arrays, strict=True))
        moved = [jax.sharding.reshard(x, s) for x, s in zip(arrays, specs, strict=True)]
        out = P(*(RULES[dim] if dim else None for dim in out_dims))
        return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=check_types)(*moved)

    return call


def shard_index(dim: str) -> jax.Array | int:
    """Inside `on_shards`: the number of this device's shard of a dim; 0 where it isn't split."""
    axes = RULES[dim]
    if axes is None or not _manual(axes):
        return 0
    return jax.lax.axis_index(axes)


def sum_shards(x: jax.Array, dim: str) -> jax.Array:
    """Inside `on_shards`: the sum over the shards of a dim."""
    axes = RULES[dim]
    return x if axes is None or not _manual(axes) else jax.lax.psum(x, axes)


def max_shards(x: jax.Array, dim: str) -> jax.Array:
    """Inside `on_shards`: the maximum over the shards of a dim."""
    axes = RULES[dim]
    return x if axes is None or not _manual(axes) else jax.lax.pmax(x, axes)


def gather_shards(x: jax.Array, dim: str, axis: int) -> jax.Array:
    """Inside `on_shards`: the `x` of all shards of a dim, one after another along an axis."""
    axes = RULES[dim]
    if axes is None or not _manual(axes):
        return x
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True)


def exchange_shards(x: jax.Array, dim: str, *, split_axis: int, concat_axis: int) -> jax.Array:
    """Inside `on_shards`: each shard of a dim gives the i-th part of its `x` to shard i.

    What it gets stands one after another along `concat_axis`.
    """
    axes = RULES[dim]
    if axes is None or not _manual(axes):
        return x
    return jax.lax.all_to_all(x, axes, split_axis, concat_axis, tiled=True)


def pass_on(x: jax.Array, dim: str) -> jax.Array:
    """Inside `on_shards`: the `x` of the shard of a dim before this one; the first has the last's.

    After as many passes as there are shards each has its own again.
    """
    axes = RULES[dim]
    if axes is None or not _manual(axes):
        return x
    ways = _ways(axes, current_mesh())
    return jax.lax.ppermute(x, axes, [(i, (i + 1) % ways) for i in range(ways)])


def varying_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Inside `on_shards`: `x` typed as differing between devices where any of the others does.

    Loop carries and the operands of a custom gradient must agree on that type.
    """
    wanted = frozenset().union(*(_varying(other) for other in others))
    missing = tuple(sorted(wanted - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def kv_head_copies(num_kv_heads: int) -> int:
    """How often each key-value head is repeated so that the tensor axis can split them."""
    ways = axis_size("kv_heads")
    return math.lcm(num_kv_heads, ways) // num_kv_heads


def row_iota(shape: tuple[int, int]) -> jax.Array:
    """int32 [B, T] holding each position's place in its row, laid out as a batch."""
    rows = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return lay_out(rows, ("batch", "length"))


def _spec(
    rules: dict[str, Axes],
    dims: Dims,
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    name: str,
) -> P:
    if len(dims) != len(shape):
        raise ValueError(f"{name}: {len(dims)} dims {dims} for shape {tuple(shape)}")
    return P(*(_axes(rules, *pair, mesh, name) for pair in zip(dims, shape, strict=True)))


def _axes(
    rules: dict[str, Axes], dim: str | None, size: int, mesh: Mesh | AbstractMesh, name: str
) -> Axes:
    axes = rules[dim] if dim else None
    ways = _ways(axes, mesh)
    if size % ways == 0:
        return axes
    if dim in OTHERWISE:
        return _axes(rules, OTHERWISE[dim], size, mesh, name)
    fit = [n for n in range(1, 2 * ways + 1) if size % n == 0]
    label = axes if isinstance(axes, str) else " x ".join(axes or ())
    raise ConfigError(
        f"{name}: dim '{dim}' has size {size}, which mesh axis {label} of {ways} doesn't divide; "
        f"axis sizes that fit: {', '.join(map(str, fit))}; or make the dim a multiple of {ways}",
        key="mesh",
    )


def _ways(axes: Axes, mesh: Mesh | AbstractMesh) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape.get(name, 1) for name in names)


def _local(mesh: AbstractMesh) -> bool:
    """No mesh, or inside `on_shards`."""
    return mesh.empty or bool(mesh.manual_axes)


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _manual(axes: str | tuple[str, ...]) -> bool:
    names = (axes,) if isinstance(axes, str) else axes
    return set(names) <= set(current_mesh().manual_axes)
