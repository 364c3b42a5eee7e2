"""From logits to a token of each row: pure functions, one a transform, applied in a fixed order.

Each row's result depends on that row alone: its logits, its settings, and a key made from the
seed, the sample's number and the token's position. Filters cut at a threshold, so tokens equal to
the last one kept are all kept, and the largest logit always stays.
B batch, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.inference.sampling import Sampling
from llama_jax.sharding.rules import varying_like

# What a row gives whose logits hold NaN or +inf, or nothing above -inf: no token.
NO_TOKEN = -1
# What a row that is finished already gives.
IDLE = -2


@dataclasses.dataclass(frozen=True)
class Transforms:
    """Which transforms there are: what a compiled sampler is specialised for."""

    greedy: bool
    top_k: int | None
    top_p: bool
    min_p: bool
    repetition: bool
    presence: bool
    logprobs: bool

    @staticmethod
    def of(sampling: Sampling, vocab_size: int) -> "Transforms":
        """Those that do something at these settings."""
        top_k = sampling.top_k
        return Transforms(
            greedy=sampling.temperature == 0.0,
            top_k=top_k if top_k is not None and top_k < vocab_size else None,
            top_p=sampling.top_p is not None and sampling.top_p < 1.0,
            min_p=bool(sampling.min_p),
            repetition=sampling.repetition_penalty != 1.0,
            presence=sampling.presence_penalty != 0.0,
            logprobs=sampling.logprobs,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strengths:
    """The transforms' numbers: float32 scalars, so that a change compiles nothing anew."""

    temperature: jax.Array | float
    top_p: jax.Array | float
    min_p: jax.Array | float
    repetition_penalty: jax.Array | float
    presence_penalty: jax.Array | float

    @staticmethod
    def of(sampling: Sampling) -> "Strengths":
        """A request's."""
        return Strengths(
            temperature=sampling.temperature,
            top_p=sampling.top_p or 1.0,
            min_p=sampling.min_p or 0.0,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
        )


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    transforms: Transforms,
    strengths: Strengths,
    *,
    vocab_size: jax.Array | int | None = None,
    seen_BV: jax.Array | None = None,
    made_BV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A token of each row, int32 [B], and its log-probability, float32 [B].

    Args:
      logits_BV: float32, the model's.
      keys_B: a random key for each row; of no use when greedy.
      transforms: which are applied.
      strengths: how strongly.
      vocab_size: ids from here on are never taken: a padded vocabulary's last have no text.
      seen_BV: bool, tokens of prompt and completion; for the repetition penalty.
      made_BV: bool, tokens of the completion; for the presence penalty.

    Returns:
      `NO_TOKEN` where a row's logits are unusable. Log-probabilities are those of the model's own
      distribution, before any transform; 0 unless `transforms.logprobs`.
    """
    usable_BV = logits_BV
    if vocab_size is not None:
        usable_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < vocab_size, logits_BV, -jnp.inf)
    chosen_BV = transformed(usable_BV, transforms, strengths, seen_BV=seen_BV, made_BV=made_BV)
    token_B = chosen_BV.argmax(-1) if transforms.greedy else draw(chosen_BV, keys_B)
    token_B = token_B.astype(jnp.int32)
    logprob_B = jnp.zeros(token_B.shape, jnp.float32)
    if transforms.logprobs:
        logprob_B = logprob_of(logits_BV, token_B)
    return jnp.where(jnp.isfinite(usable_BV.max(-1)), token_B, NO_TOKEN), logprob_B


def transformed(
    logits_BV: jax.Array,
    transforms: Transforms,
    strengths: Strengths,
    *,
    seen_BV: jax.Array | None = None,
    made_BV: jax.Array | None = None,
) -> jax.Array:
    """The logits that a token is drawn from; -inf for what is filtered out."""
    if transforms.repetition:
        assert seen_BV is not None
        logits_BV = penalize_repetition(logits_BV, seen_BV, strengths.repetition_penalty)
    if transforms.presence:
        assert made_BV is not None
        logits_BV = logits_BV - strengths.presence_penalty * made_BV
    if transforms.greedy:
        return logits_BV
    logits_BV = logits_BV / strengths.temperature
    if transforms.top_k is not None:
        logits_BV = keep_top_k(logits_BV, transforms.top_k)
    if transforms.top_p:
        logits_BV = keep_top_p(logits_BV, strengths.top_p)
    return keep_min_p(logits_BV, strengths.min_p) if transforms.min_p else logits_BV


def penalize_repetition(
    logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array | float
) -> jax.Array:
    """Logits of tokens seen before: divided by the penalty above 0, multiplied below."""
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """The k largest and whatever equals the k-th; the rest -inf."""
    least_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p: jax.Array | float) -> jax.Array:
    """The likeliest tokens whose probabilities reach p together, the one that crosses it included.

    Nucleus sampling (arXiv 1904.09751). Instead of a sort, the least probability kept is found bit
    by bit: probabilities are not negative, so their float32 bits are ordered as they are.
    """
    bits_BV = jax.lax.bitcast_convert_type(jax.nn.softmax(logits_BV, axis=-1), jnp.int32)

    def set_bit(number: jax.Array, least_B1: jax.Array) -> jax.Array:
        tried_B1 = least_B1 | (1 << (30 - number))
        probs_BV = jax.lax.bitcast_convert_type(bits_BV, jnp.float32)
        mass_B1 = jnp.where(bits_BV >= tried_B1, probs_BV, 0.0).sum(-1, keepdims=True)
        return jnp.where(mass_B1 >= p, tried_B1, least_B1)

    start_B1 = varying_like(jnp.zeros((bits_BV.shape[0], 1), jnp.int32), bits_BV)
    least_B1 = jax.lax.fori_loop(0, 31, set_bit, start_B1)
    return jnp.where(bits_BV >= least_B1, logits_BV, -jnp.inf)


def keep_min_p(logits_BV: jax.Array, p: jax.Array | float) -> jax.Array:
    """Tokens with at least the share p of the likeliest one's probability (arXiv 2407.01082)."""
    share_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    return jnp.where(share_BV >= p, logits_BV, -jnp.inf)


def draw(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """One token a row from softmax(logits), by the row's own key."""
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def logprob_of(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """float32 [B]: log softmax of the logits at each row's token."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def row_keys(seed: jax.Array, samples_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """A key for each row from the seed, the sample's number and the position to be filled.

    The batch has no part in it: a prompt's n-th sample is the same wherever it is made.
    """

    def key_of(number: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), position)

    return jax.vmap(key_of)(samples_B, positions_B)
