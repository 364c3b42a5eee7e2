"""Bradley-Terry losses of a reward model: elementwise, float32, any shape."""

import jax
import jax.numpy as jnp

# What a response judged better must lead by, for strengths 0 (marginally) to 3 (significantly).
# Llama 2, arXiv 2307.09288, table 27; Llama 3 has none (arXiv 2407.21783, section 4.1.2).
MARGINS: dict[str, tuple[float, float, float, float]] = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "small": (0.0, 1 / 3, 2 / 3, 1.0),
    "large": (0.0, 1.0, 2.0, 3.0),
}


def bradley_terry_loss(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0
) -> jax.Array:
    """`-log sigmoid(r_chosen - r_rejected - margin)` (arXiv 2307.09288, equation 2)."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def margins_of(strength: jax.Array, kind: str) -> jax.Array:
    """float32, by strength 0 to 3, of a kind of `MARGINS`."""
    # Not a look-up: the index would be an array that the mesh splits.
    levels = jnp.asarray(MARGINS[kind], jnp.float32)
    return sum((jnp.where(strength == i, levels[i], 0.0) for i in range(4)), jnp.float32(0.0))


def mean_reward_penalty(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """The squared mean reward of a pair, against a drift that differences don't see.

    Llama 3's reward model of images adds a small multiple of it (arXiv 2407.21783, section 7.5.4).
    """
    return (0.5 * (chosen + rejected)) ** 2
