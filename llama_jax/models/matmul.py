"""Every matrix product of the network: weights cast and gathered at use, sums in float32."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.sharding.rules import Dims, at_use, out_spec


def project(
    spec: str, x: jax.Array, w: jax.Array, w_dims: Dims, out_dims: Dims, name: str
) -> jax.Array:
    """`einsum(spec, x, w)` in x's dtype, laid out by `out_dims`.

    The weight is cast before it is gathered over fsdp, so that the gather moves compute-dtype
    bytes. The float32 result is not only for accuracy: XLA's CPU backend has a fast bfloat16
    matmul for that result type alone.
    """
    gathered = at_use(w.astype(x.dtype), w_dims)
    inputs, output = spec.split("->")
    sizes = dict(zip(inputs.replace(",", ""), (*x.shape, *w.shape), strict=True))
    layout = out_spec(out_dims, [sizes[letter] for letter in output])
    y = jnp.einsum(spec, x, gathered, preferred_element_type=jnp.float32, out_sharding=layout)
    return checkpoint_name(y.astype(x.dtype), name)
