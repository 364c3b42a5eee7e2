"""Making parameters: initial values with their layout, the same on every mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.sharding.rules import Dims, current_mesh, param_spec

# Letter of each projection's dims; einsum strings use the same.


def weight(
    rngs: nnx.Rngs,
    name: str,
    dims: Dims,
    shape: tuple[int, ...],
    std: float,
    dtype: str,
    *,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A normal-initialised parameter, stored by the sharding rules of its dims.

    Values don't depend on the mesh (`jax_threefry_partitionable`, JAX's default).
    """

    def make(spec: jax.sharding.PartitionSpec | None) -> jax.Array:
        # Drawn in float32 whatever the storage: a bfloat16 draw has only 256 distinct steps.
        value = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec)
        return (std * value).astype(dtype)

    return _param(make, name, dims, shape, kind)


def ones(name: str, dims: Dims, shape: tuple[int, ...], dtype: str) -> nnx.Param:
    """A parameter that starts at 1: a norm's scale."""
    return filled(1.0, name, dims, shape, dtype)


def bias(name: str, dims: Dims, shape: tuple[int, ...], dtype: str) -> nnx.Param:
    """A parameter that starts at 0."""
    return filled(0.0, name, dims, shape, dtype)


def filled(
    value: float,
    name: str,
    dims: Dims,
    shape: tuple[int, ...],
    dtype: str,
    *,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A parameter that starts at one value."""

    def make(spec: jax.sharding.PartitionSpec | None) -> jax.Array:
        return jnp.full(shape, value, dtype, out_sharding=spec)

    return _param(make, name, dims, shape, kind)


def _param(
    make: Callable[[jax.sharding.PartitionSpec | None], jax.Array],
    name: str,
    dims: Dims,
    shape: tuple[int, ...],
    kind: type[nnx.Param],
) -> nnx.Param:
    mesh = current_mesh()
    spec = None if mesh.empty else param_spec(dims, shape, mesh, name)
    # `dims` travels with the parameter (without the leading "layers" of stacked ones).
    return kind(make(spec), dims=dims)
