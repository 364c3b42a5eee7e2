"""Rotary position embedding (arXiv 2104.09864), in the half-split order of Hugging Face.

Pair i of a head is (x[i], x[i + H/2]); Meta's files pair (x[2i], x[2i+1]) and are reordered when
read. B batch, T length, N heads, H head dim, R = H / 2 pairs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import LinearScaling, Llama3Scaling, RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """float32 [R]: radians a position of each pair, scaling applied."""
    # Worked out in float64 and rounded once.
    plain_R = config.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match config.scaling:
        case None:
            scaled_R = plain_R
        case LinearScaling(factor=factor):
            scaled_R = plain_R / factor
        case Llama3Scaling():
            scaled_R = _llama3(config.scaling, plain_R)
    return scaled_R.astype(np.float32)


def _llama3(scaling: Llama3Scaling, plain_R: np.ndarray) -> np.ndarray:
    """Long wavelengths divided by the factor, short ones kept, those between blended."""
    turns_R = scaling.original_max_seq_len * plain_R / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # With low == high there is no band to blend over.
    kept_R = np.clip((turns_R - low) / (high - low), 0.0, 1.0) if high > low else turns_R > high
    return (1 - kept_R) * plain_R / scaling.factor + kept_R * plain_R


def rotations(
    config: RopeConfig, head_dim: int, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, R].

    float32 whatever the compute dtype: bfloat16 holds whole positions exactly only to 256.
    """
    angles_BTR = positions_BT.astype(jnp.float32)[..., None] * frequencies(config, head_dim)
    return jnp.cos(angles_BTR), jnp.sin(angles_BTR)


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Each pair of each head turned by its angle; computed in float32, returned in x's dtype."""
    left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos_BT1R, sin_BT1R = cos_BTR[:, :, None], sin_BTR[:, :, None]
    turned = (left * cos_BT1R - right * sin_BT1R, right * cos_BT1R + left * sin_BT1R)
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
