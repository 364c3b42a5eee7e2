"""Root-mean-square normalisation. B batch, T length, D width."""

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.models.params import ones


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps), times a learned scale (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float, dtype: str, name: str) -> None:
        self.eps = eps
        self.scale = ones(f"{name}.scale", ("norm",), (width,), dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Normalised in float32, cast back to x's dtype, then scaled in it."""
        wide_BTD = x_BTD.astype(jnp.float32)
        mean_BT1 = jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True)
        normal_BTD = wide_BTD * jax.lax.rsqrt(mean_BT1 + self.eps)
        return normal_BTD.astype(x_BTD.dtype) * self.scale[...].astype(x_BTD.dtype)
