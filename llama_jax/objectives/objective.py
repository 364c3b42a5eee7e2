"""What a stage minimises: the protocol, and the table from a run's `objective` to its maker."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from llama_jax.config.run import ExecutionConfig, NextTokenConfig
from llama_jax.objectives.next_token import NextToken

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Objective(Protocol):
    """Pure function of (model, batch, key).

    Gives the SUM of the loss over the batch's targets, and a dict of sums of which `tokens`, the
    number of targets, is the denominator of all. Sums, because a mean of means is wrong whenever
    microbatches or devices hold different numbers of targets: the step divides once.
    """

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The summed loss and the sums."""
        ...


_MAKERS: dict[type, Callable[[Any, ExecutionConfig], Objective]] = {
    NextTokenConfig: lambda config, execution: NextToken(config, execution.loss_chunk_size),
}


def make_objective(config: NextTokenConfig, execution: ExecutionConfig) -> Objective:
    """The objective that a run's `objective` table asks for."""
    return _MAKERS[type(config)](config, execution)
