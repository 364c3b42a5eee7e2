"""A reward model from pairs of responses: Bradley-Terry, with what held-out pairs tell of it.

Letters: B batch, T length, R responses that a row has room for, and pairs of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config.data import STRENGTHS
from llama_jax.config.post_training import RewardConfig
from llama_jax.losses.reward import bradley_terry_loss, margins_of, mean_reward_penalty
from llama_jax.objectives.calibration import bin_sums, calibration_error
from llama_jax.objectives.responses import (
    Batch,
    counted_ids,
    hidden,
    in_hidden_order,
    of_numbered,
    sum_where,
    sums_by_response,
)

Sums = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Reward:
    """Bradley-Terry loss of the scalar head's output at the place that `loss_mask` marks.

    That is where the last token of a response has been read, one place a response.
    """

    config: RewardConfig

    @property
    def counts(self) -> tuple[str, ...]:
        """Pairs, and the tokens that were read."""
        return ("pairs", "tokens")

    @property
    def frozen(self) -> tuple[str, ...]:
        """No other model."""
        return ()

    def __call__(
        self, model: Any, batch: Batch, key: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, Sums]:
        """The summed loss, and sums.

        `pairs`; `tokens` read; `accuracy` (pairs in the right order), `margin` (the chosen one's
        lead) and, where it is asked for, `penalty`. For `figures`: `pairs_S` and `correct_S` by
        strength S, and those of `calibration`.
        """
        del key, frozen
        batch = in_hidden_order(batch)
        rewards_BT = model.rewards(hidden(model, batch))
        rewards_BR = sums_by_response(rewards_BT, counted_ids(batch), batch["chosen"].shape[1])
        chosen_BR, rejected_BR = (of_numbered(rewards_BR, batch[n]) for n in ("chosen", "rejected"))
        is_pair_BR, lead_BR = batch["chosen"] > 0, chosen_BR - rejected_BR
        margin_BR = margins_of(batch["strength"], self.config.margins)
        losses_BR = bradley_terry_loss(chosen_BR, rejected_BR, margin_BR)
        sums = {
            "pairs": is_pair_BR.sum(dtype=jnp.float32),
            "tokens": (batch["segment_ids"] > 0).sum(dtype=jnp.float32),
            "accuracy": sum_where(is_pair_BR, lead_BR > 0),
            "margin": sum_where(is_pair_BR, lead_BR),
            **_by_strength(batch["strength"], is_pair_BR, lead_BR),
            **bin_sums(lead_BR, is_pair_BR, self.config.calibration_bins),
        }
        loss = sum_where(is_pair_BR, losses_BR)
        if self.config.mean_reward_penalty:
            sums["penalty"] = sum_where(is_pair_BR, mean_reward_penalty(chosen_BR, rejected_BR))
            loss += self.config.mean_reward_penalty * sums["penalty"]
        return loss, jax.lax.stop_gradient(sums)

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss`, `accuracy`, `margin`, `accuracy_STRENGTH` of strengths seen, `calibration_error`.

        The error is of the probability `sigmoid(lead)` that the model gives to its own order.
        """
        pairs = max(sums["pairs"], 1.0)
        told = {name: sums[name] / pairs for name in ("loss", "accuracy", "margin")}
        for number, name in _numbered_strengths():
            if sums[f"pairs_{number}"]:
                told[f"accuracy_{name}"] = sums[f"correct_{number}"] / sums[f"pairs_{number}"]
        error = calibration_error(sums, self.config.calibration_bins)
        return {**told, "calibration_error": error}


def _by_strength(strength_BR: jax.Array, is_pair_BR: jax.Array, lead_BR: jax.Array) -> Sums:
    sums = {}
    for number, _ in _numbered_strengths():
        of_it_BR = is_pair_BR & (strength_BR == number)
        sums[f"pairs_{number}"] = of_it_BR.sum(dtype=jnp.float32)
        sums[f"correct_{number}"] = sum_where(of_it_BR, lead_BR > 0)
    return sums


def _numbered_strengths() -> list[tuple[int, str]]:
    """(3, "significantly") to (0, "marginally"), as batches number them."""
    return [(len(STRENGTHS) - 1 - place, name) for place, name in enumerate(STRENGTHS)]
