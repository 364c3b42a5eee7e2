"""Rotary position embedding (arXiv 2104.09864), in the half-split order of Hugging Face.

Pair i of a head is (x[i], x[i + H/2]); Meta's files pair (x[2i], x[2i+1]) and are reordered when
read. B batch, T length, N heads, H head dim, R = H / 2 pairs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """float64 [R]: radians a position of each pair, scaling applied."""
    plain_R = config.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match config.scaling:
        case None:
            scaled_R = plain_R
        case LinearScaling(factor=factor):
            scaled_R = plain_R / factor
        case Llama3Scaling():
            scaled_R = _llama3(config.scaling, plain_R)
        case YarnScaling():
            scaled_R = _yarn(config.scaling, config.theta, plain_R)
    return scaled_R


def _llama3(scaling: Llama3Scaling, plain_R: np.ndarray) -> np.ndarray:
    """Long wavelengths divided by the factor, short ones kept, those between blended."""
    turns_R = scaling.original_max_seq_len * plain_R / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # With low == high there is no band to blend over.
    kept_R = np.clip((turns_R - low) / (high - low), 0.0, 1.0) if high > low else turns_R > high
    return (1 - kept_R) * plain_R / scaling.factor + kept_R * plain_R


def _yarn(scaling: YarnScaling, theta: float, plain_R: np.ndarray) -> np.ndarray:
    """Fast pairs kept, slow ones divided, a ramp over whole pair numbers between (section 3.2)."""
    R = len(plain_R)

    def pair_that_turns(times: float) -> float:
        return R * math.log(scaling.original_max_seq_len / (times * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), 2 * R - 1)
    # A ramp of no width would divide by zero.
    divided_R = np.clip((np.arange(R) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return divided_R * plain_R / scaling.factor + (1 - divided_R) * plain_R


def _magnitude(scaling: LinearScaling | Llama3Scaling | YarnScaling | None) -> float:
    """What cosines and sines are multiplied by: 1 but for YaRN's temperature."""
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def rotations(
    config: RopeConfig, head_dim: int, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, R], right to 1e-6 at every position.

    float32 whatever the compute dtype: bfloat16 holds whole positions exactly only to 256.
    """
    angles_BTR = _angles(frequencies(config, head_dim), positions_BT)
    cos_BTR, sin_BTR = jnp.cos(angles_BTR), jnp.sin(angles_BTR)
    magnitude = _magnitude(config.scaling)
    return (cos_BTR, sin_BTR) if magnitude == 1.0 else (magnitude * cos_BTR, magnitude * sin_BTR)


def _angles(radians_R: np.ndarray, positions_BT: jax.Array) -> jax.Array:
    """Position times frequency, less whole turns: float32 [B, T, R] from -pi to pi.

    A float32 product is off by 0.01 radians at position 131,071. Here a frequency is a fraction of
    a turn in 48-bit fixed point, and unsigned overflow drops the whole turns exactly.
    """
    turns_R = np.mod(radians_R / (2 * math.pi), 1.0)
    fixed_R = np.round(turns_R * 2.0**48).astype(np.uint64)
    high_R, low_R = (fixed_R >> 16).astype(np.uint32), (fixed_R & 0xFFFF).astype(np.uint32)
    place_BT1 = positions_BT.astype(jnp.uint32)[..., None]
    # The low word's product has 48 bits; its top 32, in two parts, carry into the high word's.
    carry_BTR = (place_BT1 >> 16) * low_R + (((place_BT1 & 0xFFFF) * low_R) >> 16)
    turn_BTR = (place_BT1 * high_R + carry_BTR).astype(jnp.int32)
    return turn_BTR.astype(jnp.float32) * np.float32(2 * math.pi / 2**32)


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Each pair of each head turned by its angle; computed in float32, returned in x's dtype."""
    left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos_BT1R, sin_BT1R = cos_BTR[:, :, None], sin_BTR[:, :, None]
    turned = (left * cos_BT1R - right * sin_BT1R, right * cos_BT1R + left * sin_BT1R)
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
