"""Next-token prediction: pretraining, and the base that fine-tuning masks. B batch, T length."""

import dataclasses
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

    def __call__(
        self, model: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The summed loss over the batch's [B, T] arrays, and sums by name. `key` is not used."""
        del key
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
