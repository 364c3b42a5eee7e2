"""Next-token prediction: pretraining, and the base that fine-tuning masks. B batch, T length."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from llama_jax.config.run import NextTokenConfig
from llama_jax.losses.cross_entropy import chunked_cross_entropy
from llama_jax.sharding.zigzag import to_zigzag


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross entropy of `targets` where `loss_mask` is not 0, with the config's z term."""

    config: NextTokenConfig
    chunk_size: int

    @property
    def counts(self) -> tuple[str, ...]:
        """Targets."""
        return ("tokens",)

    @property
    def frozen(self) -> tuple[str, ...]:
        """No other model."""
        return ()

    def __call__(
        self, model: Any, batch: dict[str, jax.Array], key: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The summed loss over the batch's [B, T] arrays, and sums by name."""
        del key, frozen
        batch = to_zigzag(batch)
        x_BTD = model.hidden(
            batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"]
        )
        x_BTD, head_DV = model.for_loss(x_BTD)
        return chunked_cross_entropy(
            x_BTD,
            head_DV,
            batch["targets"],
            batch["loss_mask"],
            z_loss=self.config.z_loss,
            chunk_size=self.chunk_size,
        )

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss`, the cross entropy in nats a token: of data, the z term tells nothing."""
        return {"loss": sums["cross_entropy"] / max(sums["tokens"], 1.0)}
