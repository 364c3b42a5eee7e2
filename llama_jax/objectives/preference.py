"""Learning from preferences by log-probabilities of whole responses: DPO and its relatives.

Letters: B batch, T length, R responses that a row has room for, and pairs of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config.loading import ConfigError
from llama_jax.config.post_training import DPOConfig
from llama_jax.losses.preference import (
    hinge_loss,
    ipo_loss,
    kto_divergence,
    kto_loss,
    sigmoid_loss,
)
from llama_jax.objectives.responses import (
    Batch,
    counted_ids,
    in_hidden_order,
    of_numbered,
    sum_where,
    sums_by_response,
    target_logps,
)

Sums = dict[str, jax.Array]
# What kto takes a response for, by its role: chosen and edited, rejected, mismatched.
DESIRABLE, UNDESIRABLE, MISMATCHED = (1, 3), (2,), (4,)
# Losses of log-probabilities' means a token, not of their sums.
_OF_MEANS = ("ipo", "length_normalised", "simpo")


class _Responses(NamedTuple):
    """Of each response, [B, R]; 0 where a row has no such response."""

    value: jax.Array  # what the loss compares: of sums or means, over the reference or not
    reward: jax.Array  # beta times what the policy prefers it by, without gradient
    nll: jax.Array  # mean negative log-likelihood a token, all of its tokens counted


@dataclasses.dataclass(frozen=True)
class Preference:
    """Loss of pairs (kto: of single responses), and `nll_weight` times the chosen one's NLL.

    Formatting is left out of a response's log-probability where `loss_mask` is 0. The NLL, which is
    there to keep formatting as it is (arXiv 2407.21783, section 4.1.4), is over all of the chosen
    response's places and divided by their number (arXiv 2404.19733, equation 1).
    """

    config: DPOConfig
    chunk_size: int

    @property
    def counts(self) -> tuple[str, ...]:
        """Pairs and target tokens; kto counts by responses."""
        first = ("responses", "pairs") if self.config.loss == "kto" else ("pairs",)
        return (*first, "tokens")

    @property
    def frozen(self) -> tuple[str, ...]:
        """The reference, where it is live."""
        return ("reference",) if self.config.reference_source == "live" else ()

    def __call__(
        self, model: Any, batch: Batch, key: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, Sums]:
        """The summed loss, and sums.

        Of pairs: `chosen_reward`, `rejected_reward`, `margin`, `accuracy`, `nll`. With kto, which
        counts responses, in pairs or not, sums over these and over pairs are for `figures`, and
        `divergence` is its z.

        Raises:
          ConfigError: reference log-probabilities are wanted but not in the batch.
        """
        del key
        batch = in_hidden_order(batch)
        responses = self._responses(model, batch, frozen)
        is_pair_BR = batch["chosen"] > 0
        sums = {
            "pairs": is_pair_BR.sum(dtype=jnp.float32),
            "tokens": (counted_ids(batch) > 0).sum(dtype=jnp.float32),
        }
        of_pairs = _pair_sums(responses.reward, batch, is_pair_BR)
        if self.config.loss == "kto":
            loss, more = self._kto(responses, batch)
            return loss, sums | more | {f"pairs_{n}": of_pairs[n] for n in ("margin", "accuracy")}
        margin_BR = _difference(responses.value, batch)
        nll_BR = of_numbered(responses.nll, batch["chosen"])
        losses_BR = _LOSSES[self.config.loss](self.config)(margin_BR)
        losses_BR += self.config.nll_weight * nll_BR
        nll = sum_where(is_pair_BR, nll_BR)
        return sum_where(is_pair_BR, losses_BR), sums | of_pairs | {"nll": nll}

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss`, and of pairs `chosen_reward`, `rejected_reward`, `margin`, `accuracy`; `nll`.

        With kto both rewards are of all desirable and all undesirable responses, as TRL tells them,
        and what there is none of is left out: margin and accuracy without pairs.
        """
        count = max(sums[self.counts[0]], 1.0)
        if self.config.loss == "kto":
            means = {name: sums[name] / count for name in ("loss", "nll", "divergence")}
            return means | _kto_figures(sums)
        pairs = max(sums["pairs"], 1.0)
        of_pairs = {name: sums[name] / pairs for name in _PAIR_FIGURES}
        return {"loss": sums["loss"] / count, **of_pairs, "nll": sums["nll"] / count}

    def _responses(self, model: Any, batch: Batch, frozen: Mapping[str, Any]) -> _Responses:
        count = batch["chosen"].shape[1]
        of_response = functools.partial(sums_by_response, count=count)
        counted_BT, all_BT = counted_ids(batch), batch["response_ids"]
        ones_BT = jnp.ones_like(batch["loss_mask"])
        lengths_BR = jnp.maximum(of_response(ones_BT, counted_BT), 1.0)
        logps_BT = target_logps(model, batch, self.chunk_size)
        ratios_BR = of_response(logps_BT, counted_BT) - self._reference(batch, frozen, of_response)
        means_BR = ratios_BR / lengths_BR
        value_BR = means_BR if self.config.loss in _OF_MEANS else ratios_BR
        # A reward is the policy's own, whatever surrogate is trained; simpo's is of means.
        reward_BR = means_BR if self.config.loss == "simpo" else ratios_BR
        all_lengths_BR = jnp.maximum(of_response(ones_BT, all_BT), 1.0)
        return _Responses(
            value=value_BR,
            reward=jax.lax.stop_gradient(self.config.beta * reward_BR),
            nll=-of_response(logps_BT, all_BT) / all_lengths_BR,
        )

    def _reference(
        self,
        batch: Batch,
        frozen: Mapping[str, Any],
        of_response: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> jax.Array | float:
        """Summed log-probabilities [B, R] under the reference; 0 where none is used."""
        if self.config.reference_source is None:
            return 0.0
        if self.config.reference_source == "live":
            logps_BT = target_logps(frozen["reference"], batch, self.chunk_size)
            return jax.lax.stop_gradient(of_response(logps_BT, counted_ids(batch)))
        if "reference_logps" not in batch:
            raise ConfigError(
                "'cached', but the batch has no reference_logps", key="objective.reference"
            )
        return batch["reference_logps"]

    def _kto(self, responses: _Responses, batch: Batch) -> tuple[jax.Array, Sums]:
        config, roles_BR = self.config, batch["roles"]
        desirable_BR, undesirable_BR, mismatched_BR = (
            functools.reduce(jnp.logical_or, (roles_BR == role for role in roles))
            for roles in (DESIRABLE, UNDESIRABLE, MISMATCHED)
        )
        divergence = kto_divergence(responses.value, mismatched_BR)
        losses_BR = kto_loss(
            responses.value,
            desirable_BR,
            divergence,
            beta=config.beta,
            desirable_weight=_or_one(config.desirable_weight),
            undesirable_weight=_or_one(config.undesirable_weight),
        )
        nll = sum_where(desirable_BR, responses.nll)
        loss = sum_where(desirable_BR | undesirable_BR, losses_BR) + config.nll_weight * nll
        kinds = {"desirable": desirable_BR, "undesirable": undesirable_BR}
        counts = {f"{n}_responses": is_BR.sum(dtype=jnp.float32) for n, is_BR in kinds.items()}
        rewards = {f"{n}_reward": sum_where(is_BR, responses.reward) for n, is_BR in kinds.items()}
        count = counts["desirable_responses"] + counts["undesirable_responses"]
        sums = {"responses": count, "nll": nll, "divergence": divergence * count}
        return loss, sums | counts | rewards


_PAIR_FIGURES = ("chosen_reward", "rejected_reward", "margin", "accuracy")
_LOSSES: dict[str, Callable[[DPOConfig], Callable[[jax.Array], jax.Array]]] = {
    "sigmoid": lambda c: functools.partial(
        sigmoid_loss, beta=c.beta, label_smoothing=c.label_smoothing
    ),
    "length_normalised": lambda c: functools.partial(
        sigmoid_loss, beta=c.beta, label_smoothing=c.label_smoothing
    ),
    "simpo": lambda c: functools.partial(
        sigmoid_loss, beta=c.beta, label_smoothing=c.label_smoothing, gamma=c.gamma or 0.0
    ),
    "ipo": lambda c: functools.partial(ipo_loss, beta=c.beta),
    "hinge": lambda c: functools.partial(hinge_loss, beta=c.beta),
}


def _kto_figures(sums: Mapping[str, float]) -> dict[str, float]:
    ratios = (
        ("chosen_reward", "desirable_reward", "desirable_responses"),
        ("rejected_reward", "undesirable_reward", "undesirable_responses"),
        ("margin", "pairs_margin", "pairs"),
        ("accuracy", "pairs_accuracy", "pairs"),
    )
    return {name: sums[part] / sums[count] for name, part, count in ratios if sums[count]}


def _pair_sums(reward_BR: jax.Array, batch: Batch, is_pair_BR: jax.Array) -> Sums:
    chosen_BR, rejected_BR = (of_numbered(reward_BR, batch[n]) for n in ("chosen", "rejected"))
    values = (chosen_BR, rejected_BR, chosen_BR - rejected_BR, chosen_BR > rejected_BR)
    return {n: sum_where(is_pair_BR, v) for n, v in zip(_PAIR_FIGURES, values, strict=True)}


def _difference(values_BR: jax.Array, batch: Batch) -> jax.Array:
    return of_numbered(values_BR, batch["chosen"]) - of_numbered(values_BR, batch["rejected"])


def _or_one(weight: float | None) -> float:
    return 1.0 if weight is None else weight
