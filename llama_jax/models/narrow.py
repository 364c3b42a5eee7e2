"""Gradients of the layers' matrices kept as they were made, in the compute dtype.

A matrix is stored in float32 and cast where it is used, so its gradient comes in the compute dtype
and would be cast back to float32 on the way out of the layer: the same values in twice the memory.
Here the gradient is taken of a stand-in in the compute dtype instead, a zero beside each matrix,
which XLA never makes: nothing reads it.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Parameters that nothing reads uncast.
CAST_AT_USE = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Narrow:
    """Stands in for a parameter's array: `Narrow[...]` is itself.

    Attributes:
      value: the parameter, which is not differentiated.
      stand_in: of the value's shape, in the compute dtype; gets the gradient.
    """

    value: jax.Array
    stand_in: jax.Array

    def __getitem__(self, index: types.EllipsisType) -> "Narrow":
        assert index is ..., "a matrix is taken whole"
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """Of the value."""
        return self.value.ndim


def cast(w: jax.Array | Narrow, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`w.astype(dtype)`, made where it is used.

    A plain cast of a layer's slice XLA's TPU compiler turns into the slice of a cast, made of all
    layers before the loop and held to the end of the backward pass: 2 bytes a parameter. Rounding
    first, to the same values, keeps it in the loop (an optimization barrier doesn't).
    """
    if isinstance(w, Narrow):
        assert w.stand_in.dtype == dtype
        return _cast_narrow(jax.lax.stop_gradient(w.value), w.stand_in)
    return _round(w, dtype)


def stand_ins(params: nnx.State, dtype: jax.typing.DTypeLike) -> tuple[Any, Callable[[Any], Any]]:
    """What to differentiate instead of the parameters, and how to make parameters of it.

    The first has zeros in `dtype` for every matrix that is cast where it is used; the gradient
    with respect to it has the parameters' structure and shapes.
    """
    narrow = nnx.map_state(
        lambda path, param: param.replace(path[-1] in CAST_AT_USE and param.dtype != dtype), params
    )

    def zero(is_narrow: bool, value: jax.Array) -> jax.Array:
        return jnp.zeros_like(value, dtype) if is_narrow else value

    def join(differentiated: Any) -> Any:
        def one(is_narrow: bool, value: jax.Array, leaf: jax.Array) -> Any:
            return Narrow(value, leaf) if is_narrow else leaf

        return jax.tree.map(one, narrow, params, differentiated)

    return jax.tree.map(zero, narrow, params), join


@jax.custom_vjp
def _cast_narrow(value: jax.Array, stand_in: jax.Array) -> jax.Array:
    return _round(value, stand_in.dtype)


def _forward(value: jax.Array, stand_in: jax.Array) -> tuple[jax.Array, None]:
    return _cast_narrow(value, stand_in), None


def _backward(_: None, gradient: jax.Array) -> tuple[None, jax.Array]:
    return None, gradient


_cast_narrow.defvjp(_forward, _backward)


def _round(w: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    if w.dtype == dtype:
        return w
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(w, kind.nexp, kind.nmant).astype(dtype)


def settled_together(x: jax.Array, w: jax.Array | Narrow) -> tuple[jax.Array, jax.Array | Narrow]:
    """Both unchanged; their gradients are ready together.

    The gradient of a large matrix, reduced over devices, so doesn't wait in its full size until the
    end of the backward pass that goes on from x.
    """
    if isinstance(w, Narrow):
        x, stand_in = _together(x, w.stand_in)
        return x, Narrow(w.value, stand_in)
    return _together(x, w)


@jax.custom_vjp
def _together(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, w


def _together_forward(x: jax.Array, w: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    return (x, w), None


def _together_backward(
    _: None, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return jax.lax.optimization_barrier(gradients)


_together.defvjp(_together_forward, _together_backward)
