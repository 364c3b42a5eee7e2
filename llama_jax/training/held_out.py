"""Figures of the held-out part: what the objective tells of its sums, and bits a byte of text."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.data.device import to_device
from llama_jax.data.rows import Batch
from llama_jax.metrics.compression import bits_per_byte
from llama_jax.objectives.objective import Objective
from llama_jax.training.state import TrainState, best_params
from llama_jax.training.step import JittedStep

# One pass over the held-out batches, each with the bytes of text of its targets.
HeldOutBatches = Callable[[], Iterator[tuple[Batch, float]]]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What was seen on held-out data.

    Attributes:
      loss: by the objective's first count; of next tokens the cross entropy, in nats a token.
      tokens: over how many targets.
      bits_per_byte: the same by bytes of text; None where the loss isn't about text alone.
      text_bytes: over how many; None with it.
      figures: what else the objective tells, such as accuracies.
    """

    loss: float
    tokens: float
    bits_per_byte: float | None = None
    text_bytes: float | None = None
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_table(self) -> dict[str, float]:
        """All of it by name, without what there isn't."""
        table = dataclasses.asdict(self)
        figures = table.pop("figures")
        return {name: value for name, value in table.items() if value is not None} | figures


def evaluate(
    state: TrainState,
    eval_step: JittedStep,
    objective: Objective,
    batches: HeldOutBatches,
    mesh: Mesh,
) -> HeldOut:
    """The figures of a state's parameters over one pass; see `evaluate_params`."""
    params = best_params(state)
    return evaluate_params(params, state.frozen, eval_step, objective, batches, mesh)


def evaluate_params(
    params: Any,
    frozen: Mapping[str, Any],
    eval_step: JittedStep,
    objective: Objective,
    batches: HeldOutBatches,
    mesh: Mesh,
) -> HeldOut:
    """The figures of parameters over one pass; sums are kept in float64 on the host.

    Every token that a document's ids predict counts, its end mark included; what the begin mark
    costs is nothing, for it is given.
    """
    sums: dict[str, float] = collections.defaultdict(float)
    text_bytes = 0.0
    for batch, batch_bytes in batches():
        found = jax.device_get(eval_step(params, frozen, to_device(batch, mesh)))
        for name, value in found.items():
            sums[name] += float(value)
        text_bytes += batch_bytes
    figures = objective.figures(sums)
    loss, tokens = figures.pop("loss"), sums["tokens"]
    if "cross_entropy" not in sums or not text_bytes:
        return HeldOut(loss, tokens, figures=figures)
    return HeldOut(loss, tokens, bits_per_byte(loss, tokens, text_bytes), text_bytes, figures)
