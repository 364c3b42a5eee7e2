"""One matrix product with both operands rounded to 8 bits, by qwix, on each device's own shards.

Scales are a row's and a column's own largest value, taken from what a device holds. Products over
a split dim are scaled back before they are summed over devices, in the operands' dtype: sums of
integers over all of a batch's tokens would leave 32 bits, and take twice the bytes.
"""

import functools
import importlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llama_jax.config.hardware import Chip
from llama_jax.config.loading import ConfigError

Precision = Literal["int8", "fp8"]
Role = Literal["value", "gradient"]
Contracted = tuple[tuple[int, ...], tuple[int, ...]]

# Gradients need range more than digits (FP8 Formats for Deep Learning, arXiv 2209.05433).
TYPES: dict[tuple[Precision, Role], Any] = {
    ("int8", "value"): jnp.int8,
    ("int8", "gradient"): jnp.int8,
    ("fp8", "value"): jnp.float8_e4m3fn,
    ("fp8", "gradient"): jnp.float8_e5m2,
}


def quantized_dot(
    a: jax.Array,
    b: jax.Array,
    contracted: Contracted,
    layout: PartitionSpec | None,
    precision: Precision,
    roles: tuple[Role, Role] = ("value", "value"),
) -> jax.Array:
    """`dot_general(a, b)` without batch dims, operands in 8 bits, in a's dtype; no gradient rule.

    Args:
      contracted: dims of a and of b that are summed over, laid out alike.
      layout: of the result: a's other dims, then b's; None where no mesh is set.
      roles: what a and b are, which decides their 8-bit types.

    Raises:
      ConfigError: qwix isn't installed.
    """
    local = functools.partial(_local_dot, contracted=contracted, precision=precision, roles=roles)
    if layout is None:
        return local(a, b)
    a_spec, b_spec = (list(_spec(array)) for array in (a, b))
    # Operands lie as the product needs them: split alike where they are summed over, and elsewhere
    # as the result, which can't be split over the devices that it is summed over until after that.
    for a_dim, b_dim in zip(*contracted, strict=True):
        common = tuple(axis for axis in _names(a_spec[a_dim]) if axis in _names(b_spec[b_dim]))
        a_spec[a_dim] = b_spec[b_dim] = common
    summed = tuple(axis for dim in contracted[0] for axis in a_spec[dim])
    rank = a.ndim + b.ndim - 2 * len(contracted[0])
    wanted = (*layout, *(None,) * (rank - len(layout)))
    free = [tuple(axis for axis in _names(entry) if axis not in summed) for entry in wanted]
    a_free, b_free = (
        [dim for dim in range(array.ndim) if dim not in dims]
        for array, dims in zip((a, b), contracted, strict=True)
    )
    for number, dim in enumerate(a_free):
        a_spec[dim] = free[number]
    for number, dim in enumerate(b_free):
        b_spec[dim] = free[len(a_free) + number]

    def on_shard(a: jax.Array, b: jax.Array) -> jax.Array:
        y = local(a, b)
        return jax.lax.psum(y, summed) if summed else y

    specs = PartitionSpec(*a_spec), PartitionSpec(*b_spec)
    moved = (jax.sharding.reshard(x, spec) for x, spec in zip((a, b), specs, strict=True))
    y = jax.shard_map(on_shard, in_specs=specs, out_specs=PartitionSpec(*free))(*moved)
    return jax.sharding.reshard(y, layout)


def without_units(precision: str, chip: Chip) -> str | None:
    """What is lost on a chip that has no units for a precision, in a line; None where it has them.

    Such a chip computes the same, on its bfloat16 units.
    """
    if precision == "default" or chip.peak_flops.get(precision, 0) > chip.peak_flops["bf16"]:
        return None
    return (
        f"execution.matmul_precision = '{precision}' gains no speed on {chip.name}: it has no "
        f"faster units for {precision} than for bfloat16, and rounding costs time"
    )


def _local_dot(
    a: jax.Array,
    b: jax.Array,
    *,
    contracted: Contracted,
    precision: Precision,
    roles: tuple[Role, Role],
) -> jax.Array:
    qwix = _qwix()
    operands = [
        qwix.quantize(
            # Scales and quotients in float32: bfloat16 has no digit to spare between 64 and 127.
            array.astype(jnp.float32),
            TYPES[precision, role],
            channelwise_axes=[dim for dim in range(array.ndim) if dim not in summed],
        )
        for array, summed, role in zip((a, b), contracted, roles, strict=True)
    ]
    numbers = (contracted, ((), ()))
    y = qwix.dot_general(*operands, numbers, preferred_element_type=jnp.float32)
    return y.astype(a.dtype)


def _qwix() -> Any:
    # Imported where it is used: an optional extra that takes a second to load.
    try:
        return importlib.import_module("qwix")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"8-bit products need qwix ({error}): pip install 'llama-jax[quant]'",
            key="execution.matmul_precision",
        ) from None


def _spec(array: jax.Array) -> tuple[Any, ...]:
    spec = jax.typeof(array).sharding.spec
    return (*spec, *(None,) * (array.ndim - len(spec)))


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
