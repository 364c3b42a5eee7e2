"""Losses of preferences, of log-probabilities of whole responses: elementwise, float32, any shape.

`margin` is h = rho(chosen) - rho(rejected), where rho is what the policy prefers a response by:
log pi(y|x) - log pi_ref(y|x), its mean a token, or log pi(y|x) alone. Which one is the objective's
choice. What is no pair (or no response) is the caller's to leave out.
"""

import jax
import jax.numpy as jnp


def sigmoid_loss(
    margin: jax.Array, *, beta: float, label_smoothing: float = 0.0, gamma: float = 0.0
) -> jax.Array:
    """DPO: `-log sigmoid(beta h)` (arXiv 2305.18290, equation 7).

    With smoothing e, for labels that are wrong with that probability, conservative DPO:
    `-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)`. With mean log-probabilities and no
    reference, `beta h - gamma` in place of `beta h` is SimPO (arXiv 2405.14734, equation 6).
    """
    scaled = beta * margin - gamma
    right, wrong = -jax.nn.log_sigmoid(scaled), -jax.nn.log_sigmoid(-scaled)
    return (1.0 - label_smoothing) * right + label_smoothing * wrong


def ipo_loss(margin: jax.Array, *, beta: float) -> jax.Array:
    """`(h - 1 / (2 beta))^2` (arXiv 2310.12036, equation 17); h of means a token in practice."""
    return (margin - 1.0 / (2.0 * beta)) ** 2


def hinge_loss(margin: jax.Array, *, beta: float) -> jax.Array:
    """`max(0, 1 - beta h)`: SLiC (arXiv 2305.10425), its margin in units of beta."""
    return jax.nn.relu(1.0 - beta * margin)


def kto_loss(
    ratios: jax.Array,
    desirable: jax.Array,
    divergence: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """KTO (arXiv 2402.01306, equation 8) of single responses.

    `weight * (1 - sigmoid(beta (rho - z)))` where desirable, `(1 - sigmoid(beta (z - rho)))` else.

    Args:
      ratios: rho, log pi(y|x) - log pi_ref(y|x).
      desirable: booleans.
      divergence: z, a scalar of `kto_divergence`; no gradient flows through it.
    """
    distance = beta * (ratios - jax.lax.stop_gradient(divergence))
    sign = jnp.where(desirable, 1.0, -1.0)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-sign * distance)  # 1 - sigmoid(a) is sigmoid(-a)


def kto_divergence(ratios: jax.Array, mismatched: jax.Array) -> jax.Array:
    """KTO's z: `max(0, mean rho)` over responses to other prompts; 0 where there are none.

    An estimate of KL(pi || pi_ref) of the policy as it is: it carries no gradient.

    Args:
      ratios: rho of each response.
      mismatched: booleans, which of them stand after another record's prompt.
    """
    count = mismatched.sum(dtype=jnp.float32)
    total = jnp.where(mismatched, ratios, 0.0).sum()
    return jax.lax.stop_gradient(jax.nn.relu(total / jnp.maximum(count, 1.0)))
