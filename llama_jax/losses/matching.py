"""A chunk of tokens' student logits against a teacher's, on the shards of a vocabulary.

Letters: C tokens, V vocabulary, K stored tokens, O outcomes (V, or K and the rest).
"""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.losses.chunks import Layout, first_column, log_z, psum
from llama_jax.losses.divergence import Divergence, divergence

# A stored distribution's rest is 1 less a float32 sum: less than this is the sum's rounding.
LEAST_REST = 1e-6


@dataclasses.dataclass(frozen=True)
class Matching:
    """How the distributions are compared; see `losses.divergence`. `beta` is jsd's alone."""

    kind: Divergence = "forward_kl"
    beta: float = 0.5
    # Both distributions are those of logits / temperature, and the loss is times its square, so
    # that gradients keep their size (arXiv 1503.02531, section 2).
    temperature: float = 1.0


def full_match(
    logits_CV: jax.Array, teacher_CV: jax.Array, layout: Layout, matching: Matching
) -> tuple[jax.Array, jax.Array]:
    """The divergence [C], and its slope [C, V], between all logits."""
    scaled = [logits / matching.temperature for logits in (logits_CV, teacher_CV)]
    student_CV, teacher_CV = (logits - log_z(logits, layout)[:, None] for logits in scaled)
    return divergence(
        matching.kind,
        student_CV,
        teacher_CV,
        beta=matching.beta,
        total=lambda array_CV: psum(array_CV.sum(axis=1), layout.vocab_axes),
    )


def stored_match(
    logits_CV: jax.Array,
    ids_CK: jax.Array,
    logps_CK: jax.Array,
    layout: Layout,
    matching: Matching,
) -> tuple[jax.Array, jax.Array]:
    """The same between the stored outcomes; the slope spread again over all logits."""
    rows_C1 = jnp.arange(ids_CK.shape[0])[:, None]
    columns = logits_CV.shape[1]
    local_CK = ids_CK - first_column(columns, layout)
    here_CK = (local_CK >= 0) & (local_CK < columns)
    picked_CK = jnp.take_along_axis(logits_CV, jnp.where(here_CK, local_CK, 0), axis=1)
    student_CO = psum(jnp.where(here_CK, picked_CK, 0.0), layout.vocab_axes)
    places = (rows_C1, jnp.where(here_CK, local_CK, columns))  # past the end: dropped
    stored_CV = jnp.zeros(logits_CV.shape, bool).at[places].set(True, mode="drop")
    teacher_CO, rest_C = logps_CK, None
    if ids_CK.shape[1] < columns * _shards(layout):
        rest_C = log_z(jnp.where(stored_CV, -jnp.inf, logits_CV), layout)
        student_CO = jnp.concatenate([student_CO, rest_C[:, None]], axis=1)
        left_C = jnp.maximum(1.0 - jnp.exp(logps_CK).sum(axis=1), LEAST_REST)
        teacher_CO = jnp.concatenate([logps_CK, jnp.log(left_C)[:, None]], axis=1)
    student_CO, teacher_CO = (
        jax.nn.log_softmax(outcomes_CO / matching.temperature, axis=1)
        for outcomes_CO in (student_CO, teacher_CO)
    )
    loss_C, slope_CO = divergence(matching.kind, student_CO, teacher_CO, beta=matching.beta)
    # The slopes add up to 0, so the normaliser that all outcomes share passes nothing on.
    slope_CV = jnp.zeros_like(logits_CV).at[places].set(slope_CO[:, : ids_CK.shape[1]], mode="drop")
    if rest_C is not None:
        share_CV = jnp.exp(logits_CV - rest_C[:, None])
        slope_CV = jnp.where(stored_CV, slope_CV, slope_CO[:, -1:] * share_CV)
    return loss_C, slope_CV


def _shards(layout: Layout) -> int:
    return jax.lax.axis_size(layout.vocab_axes) if layout.vocab_axes else 1
