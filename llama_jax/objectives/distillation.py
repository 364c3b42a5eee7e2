"""Distillation: the student's distribution of every target's place drawn to the teacher's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from llama_jax.config.loading import ConfigError
from llama_jax.config.post_training import DistillConfig
from llama_jax.losses.distillation import LiveTeacher, StoredTeacher, distillation_loss
from llama_jax.losses.matching import Matching
from llama_jax.objectives.responses import Batch, hidden, in_hidden_order


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Divergence from a teacher where `loss_mask` is not 0, times the temperature's square."""

    config: DistillConfig
    chunk_size: int

    @property
    def counts(self) -> tuple[str, ...]:
        """Target tokens."""
        return ("tokens",)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The teacher, where it is live."""
        return ("teacher",) if self.config.teacher == "live" else ()

    def __call__(
        self, model: Any, batch: Batch, key: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The summed loss; `tokens`, and `nll` of the student, for comparing with hard labels.

        Raises:
          ConfigError: the teacher's vocabulary isn't the student's, or what is to be stored of it
            is not in the batch.
        """
        del key
        batch = in_hidden_order(batch)
        x_BTD, head_DV = model.for_loss(hidden(model, batch))
        try:
            loss, sums = distillation_loss(
                x_BTD,
                head_DV,
                self._teacher(batch, frozen),
                batch["targets"],
                batch["loss_mask"],
                matching=self._matching(),
                chunk_size=self.chunk_size,
            )
        except ValueError as error:
            raise ConfigError(str(error), key="objective.teacher") from None
        return loss, {"tokens": sums["tokens"], "nll": sums["cross_entropy"]}

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss`, the divergence as it is trained on, and `nll`, both in nats a token."""
        tokens = max(sums["tokens"], 1.0)
        return {name: sums[name] / tokens for name in ("loss", "nll")}

    def _teacher(self, batch: Batch, frozen: Mapping[str, Any]) -> LiveTeacher | StoredTeacher:
        if self.config.teacher == "live":
            teacher = frozen["teacher"]
            x_BTE, head_EV = teacher.for_loss(hidden(teacher, batch))
            return jax.lax.stop_gradient(LiveTeacher(x_BTE, head_EV))
        if "teacher_ids" not in batch:
            raise ConfigError("'stored', but the batch has no teacher_ids", key="objective.teacher")
        return StoredTeacher(batch["teacher_ids"], batch["teacher_logps"])

    def _matching(self) -> Matching:
        config = self.config
        beta = 0.5 if config.beta is None else config.beta
        return Matching(config.divergence, beta, config.temperature)
