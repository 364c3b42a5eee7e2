"""Divergences between a teacher's and a student's distribution, with their slopes.

Of arrays [C, O]: C tokens, O outcomes, which may be spread over devices or lumped together. A slope
is the derivative by the student's logits (unnormalised log-probabilities); written out, because in
it, unlike in what automatic differentiation keeps, everything is made once.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
# Sums [C, O] over all outcomes, those of other devices included, to [C].
Total = Callable[[jax.Array], jax.Array]


def divergence(
    kind: Divergence,
    student_CO: jax.Array,
    teacher_CO: jax.Array,
    *,
    beta: float = 0.5,
    total: Total = lambda array_CO: array_CO.sum(axis=-1),
) -> tuple[jax.Array, jax.Array]:
    """The divergence [C] in nats, and its derivative [C, O] by the student's logits.

    With p the student's and q the teacher's probabilities: forward_kl is `KL(q || p)`, reverse_kl
    `KL(p || q)`, jsd `beta KL(q || m) + (1 - beta) KL(p || m)` of `m = beta q + (1 - beta) p`, the
    generalised Jensen-Shannon divergence (arXiv 2306.13649, section 2), symmetric at beta 1/2.

    Args:
      student_CO, teacher_CO: log-probabilities, of one temperature.
      beta: jsd only; strictly between 0 and 1.
      total: how to sum over outcomes.
    """
    p_CO, q_CO = jnp.exp(student_CO), jnp.exp(teacher_CO)
    if kind == "forward_kl":
        return total(_weighted(q_CO, teacher_CO - student_CO)), p_CO - q_CO
    if kind == "reverse_kl":
        ratio_CO = _weighted(p_CO, student_CO - teacher_CO)
        loss_C = total(ratio_CO)
        return loss_C, ratio_CO - p_CO * loss_C[:, None]
    mixture_CO = jnp.logaddexp(teacher_CO + math.log(beta), student_CO + math.log1p(-beta))
    of_teacher_CO = beta * _weighted(q_CO, teacher_CO - mixture_CO)
    of_student_CO = (1.0 - beta) * _weighted(p_CO, student_CO - mixture_CO)
    # The mixture's own derivative cancels: its two terms' weights add up to it.
    slope_CO = of_student_CO - p_CO * total(of_student_CO)[:, None]
    return total(of_teacher_CO + of_student_CO), slope_CO


def _weighted(weight_CO: jax.Array, value_CO: jax.Array) -> jax.Array:
    # An impossible outcome adds nothing; 0 * inf would be NaN.
    return jnp.where(weight_CO > 0, weight_CO * value_CO, 0.0)
