"""Every matrix product of the network: weights cast and gathered at use, sums in float32.

Products are made two-dimensional first. XLA's CPU backend hands a plain matrix product, transposed
or not, to its fast routine, but copies its operands into another order before one over several
dims. M rows, C contracted, X other columns.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec

from llama_jax.config.run import MatmulPrecision
from llama_jax.models.narrow import Narrow, cast
from llama_jax.models.split_matrix import SplitMatrix
from llama_jax.quantization.dot import Role, quantized_dot
from llama_jax.sharding.rules import Dims, at_use, axis_size, out_spec, platform

# How a row lies while a product is made of it, where that isn't how the result lies.
GATHERED: dict[str | None, str] = {"residual_length": "length"}


def project(
    spec: str,
    x: jax.Array,
    w: jax.Array | Narrow | SplitMatrix,
    w_dims: Dims,
    out_dims: Dims,
    precision: MatmulPrecision,
    name: str | None = None,
) -> jax.Array:
    """`einsum(spec, x, w)` in x's dtype, laid out by `out_dims`.

    The weight is cast before it is gathered over fsdp, so that the gather moves compute-dtype
    bytes.

    Args:
      spec: "rows contracted,contracted columns->rows columns", such as "BTD,DNH->BTNH".
      w: a split one is in x's dtype already.
      w_dims: logical dims of w.
      out_dims: logical dims of the result; its rows are x's, gathered for the product where they
        are split as the residual stream's, which the result then is scattered to.
      precision: of the product and of both products of its gradient. A split weight, which only
        generates, has its own.
      name: under which a remat policy may keep the result.
    """
    x_letters, w_letters = spec.split("->")[0].split(",")
    contracted = len(set(x_letters) & set(w_letters))
    rows = x.ndim - contracted
    x_dims = (*(GATHERED.get(dim, dim) for dim in out_dims[:rows]), *w_dims[:contracted])
    if isinstance(w, SplitMatrix):
        return w.product(x, x_dims, out_dims).astype(x.dtype)
    gathered = at_use(cast(w, x.dtype), w_dims)
    # Rows split over their length are no contiguous range of B x T: they stay two dims.
    row_groups = (rows,) if axis_size("residual_length") == 1 else (1,) * rows
    x_MC = _merged(x, x_dims, (*row_groups, contracted))
    w_CX = _merged(gathered, w_dims, (contracted, w.ndim - contracted))
    shape = (*x.shape[:rows], *w.shape[contracted:])
    layout = out_spec(out_dims, shape)
    merged = _merged_spec(layout, (*row_groups, w.ndim - contracted))
    y_MX: jax.Array = _matmul(merged, precision, x_MC, w_CX)
    y = jnp.reshape(y_MX, shape, out_sharding=layout)
    return checkpoint_name(y, name) if name else y


def add_bias(x: jax.Array, bias: jax.Array, dims: Dims) -> jax.Array:
    """`x + bias` in x's dtype, the bias over x's last dims."""
    return x + at_use(bias.astype(x.dtype), dims)


def _merged(x: jax.Array, dims: Dims, groups: tuple[int, ...]) -> jax.Array:
    """`x` with runs of dims made one: as many dims as there are groups of these sizes."""
    shape, start = [], 0
    for size in groups:
        shape.append(math.prod(x.shape[start : start + size]))
        start += size
    layout = _merged_spec(out_spec(dims, x.shape), groups)
    return jnp.reshape(x, shape, out_sharding=layout)


def _merged_spec(spec: PartitionSpec | None, groups: tuple[int, ...]) -> PartitionSpec | None:
    """The layout after merging: of a group only the first dim may be split."""
    if spec is None:
        return None
    starts = [sum(groups[:number]) for number in range(len(groups))]
    return PartitionSpec(*(spec[start] for start in starts))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
    """What the backward pass reads; a scalar for the operand that no gradient asked for needs.

    Never None: JAX may trace the forward pass of one program for several sets of gradients, and
    remembers the structure of the last.
    """

    x: jax.Array
    w: jax.Array
    # Gradients lie as what they are gradients of; None where no mesh is set.
    x_layout: PartitionSpec | None = dataclasses.field(metadata={"static": True})
    w_layout: PartitionSpec | None = dataclasses.field(metadata={"static": True})


# Its own gradient rule, since JAX's would multiply the float32 cotangent of a float32 result by a
# bfloat16 operand: twice the bytes, and on a CPU a fifth of the speed.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(
    layout: PartitionSpec | None, precision: MatmulPrecision, x_MC: jax.Array, w_CX: jax.Array
) -> jax.Array:
    return _dot(x_MC, w_CX, ((x_MC.ndim - 1,), (0,)), layout, precision)


def _forward(
    layout: PartitionSpec | None,
    precision: MatmulPrecision,
    x: CustomVJPPrimal,
    w: CustomVJPPrimal,
) -> tuple[jax.Array, _Saved]:
    x_layout, w_layout = (
        None if layout is None else jax.typeof(operand.value).sharding.spec for operand in (x, w)
    )
    # A frozen weight's gradient is a third of a step's products: it isn't made, and the rows that
    # it would be made of aren't kept.
    nothing = jnp.zeros(())
    saved = _Saved(
        x.value if w.perturbed else nothing, w.value if x.perturbed else nothing, x_layout, w_layout
    )
    return _matmul(layout, precision, x.value, w.value), saved


def _backward(
    layout: PartitionSpec | None,
    precision: MatmulPrecision,
    saved: _Saved,
    grad_MX: jax.Array | SymbolicZero,
) -> tuple[jax.Array | None, jax.Array | None]:
    del layout
    if not isinstance(grad_MX, jax.Array):
        return None, None
    rows, columns = tuple(range(grad_MX.ndim - 1)), (grad_MX.ndim - 1,)
    grad_x_MC, grad_w_CX, after_MX = None, None, grad_MX
    if saved.x.ndim:
        roles: tuple[Role, Role] = ("value", "gradient")
        grad_w_CX = _dot(saved.x, grad_MX, (rows, rows), saved.w_layout, precision, roles)
        # First this one, after which the rows that it is made of can be forgotten: at the peak of
        # an MLP's backward pass one wide tensor fewer. Where sums are scattered over the length,
        # the compiler would make them whole first.
        if axis_size("residual_length") == 1:
            grad_w_CX, after_MX = jax.lax.optimization_barrier((grad_w_CX, grad_MX))
    if saved.w.ndim:
        roles = ("gradient", "value")
        grad_x_MC = _dot(after_MX, saved.w, (columns, (1,)), saved.x_layout, precision, roles)
    return grad_x_MC, grad_w_CX


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _dot(
    a: jax.Array,
    b: jax.Array,
    contracted: tuple[tuple[int, ...], tuple[int, ...]],
    layout: PartitionSpec | None,
    precision: MatmulPrecision,
    roles: tuple[Role, Role] = ("value", "value"),
) -> jax.Array:
    if precision != "default":
        return quantized_dot(a, b, contracted, layout, precision, roles)
    # XLA's CPU backend has a fast bfloat16 matmul for bfloat16 operands with a float32 result
    # alone. Others sum in float32 anyway and round what they write; a float32 result would go
    # through memory, and between devices, at twice the bytes.
    wide = jnp.float32 if platform() == "cpu" else None
    y = jax.lax.dot_general(
        a, b, (contracted, ((), ())), preferred_element_type=wide, out_sharding=layout
    )
    return y.astype(a.dtype)
