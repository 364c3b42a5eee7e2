"""Stochastic rounding to bfloat16: up or down with the odds that make the mean exact.

Rounding to nearest loses a change of under half a unit in the last place whenever it is made; a
moment that moves by a few per cent of itself each step would stand still in bfloat16. Bits come
from a counter-based generator, so they are the same on every mesh.
"""

import jax
import jax.numpy as jnp


def stochastic_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 `x` as bfloat16, one of the two neighbours; mean over the bits is `x`.

    A value that bfloat16 holds is left alone. Values past the largest may become infinite, as in
    rounding to nearest; what is not finite stays so.

    Args:
      bits: uniform uint32, of which the low 16 are used.
    """
    # bfloat16 is float32 without its low 16 bits. Adding random ones carries into those that are
    # kept with a chance of exactly the part that is dropped, for either sign.
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    words = (words + (bits & 0xFFFF)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(words, jnp.float32)
    # A NaN's payload would carry into its sign and exponent.
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def random_bits(key: jax.Array, like: jax.Array) -> jax.Array:
    """Uniform uint32 of the shape and layout of `like`."""
    sharding = jax.typeof(like).sharding
    layout = None if sharding.mesh.empty else sharding.spec
    return jax.random.bits(key, like.shape, jnp.uint32, out_sharding=layout)
