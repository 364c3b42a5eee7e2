"""What a stage minimises: the protocol, and the table from a run's `objective` to its maker."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from llama_jax.config.post_training import DistillConfig, DPOConfig, RewardConfig
from llama_jax.config.run import ExecutionConfig, NextTokenConfig
from llama_jax.objectives.distillation import Distillation
from llama_jax.objectives.next_token import NextToken
from llama_jax.objectives.preference import Preference
from llama_jax.objectives.reward import Reward

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
ObjectiveConfig = NextTokenConfig | RewardConfig | DPOConfig | DistillConfig
# Sums whose names begin so are of parts of the batch (pairs of one strength, say). They are for
# `figures`: their ratio to the first count means nothing, so a step doesn't report it.
OF_PARTS = ("correct_", "pairs_", "bins_", "desirable_", "undesirable_")


class Objective(Protocol):
    """Pure function of (model, batch, key, frozen).

    Gives the SUM of the loss over what the batch is counted in, targets or pairs, and a dict of
    sums. Sums, because a mean of means is wrong whenever microbatches or devices hold different
    numbers of targets: the step divides once.

    """

    @property
    def counts(self) -> tuple[str, ...]:
        """Sums that are numbers of things, `tokens` among them, reported as they are.

        The first divides the loss and every other sum.
        """
        ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """The models that it reads beside the one that is trained: "reference", "teacher"."""
        ...

    def __call__(
        self, model: Any, batch: Batch, key: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, Metrics]:
        """The summed loss and the sums."""
        ...

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What is told of a held-out pass from its sums, `loss` among them.

        The sum of the loss that is trained on is `sums["loss"]`.
        """
        ...


_MAKERS: dict[type, Callable[[Any, ExecutionConfig], Objective]] = {
    NextTokenConfig: lambda config, execution: NextToken(config, execution.loss_chunk_size),
    RewardConfig: lambda config, execution: Reward(config),
    DPOConfig: lambda config, execution: Preference(config, execution.loss_chunk_size),
    DistillConfig: lambda config, execution: Distillation(config, execution.loss_chunk_size),
}


def make_objective(config: ObjectiveConfig, execution: ExecutionConfig) -> Objective:
    """The objective that a run's `objective` table asks for."""
    return _MAKERS[type(config)](config, execution)
