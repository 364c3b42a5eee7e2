"""Greedy soups: which checkpoints' mean is best on held-out data (arXiv 2203.05482, recipe 1).

How good one is says a function of it; here is only which means are tried, and which are kept.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from llama_jax.config.loading import ConfigError
from llama_jax.interchange.averaging_source import AveragedSource
from llama_jax.interchange.source import Source

# Of a checkpoint on held-out data; the lower, the better.
HeldOutLoss = Callable[[Source], float]


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of one ingredient.

    Attributes:
      loss: its own.
      place: when it was tried, from 1: the ingredients by their own losses, the best first.
      kept: whether it is in the soup.
      soup_loss: of the uniform mean of those kept before and this one.
    """

    loss: float
    place: int
    kept: bool
    soup_loss: float


def greedy_soup(
    sources: Sequence[Source], held_out_loss: HeldOutLoss, said: Callable[[str], None] | None = None
) -> list[Trial]:
    """The best one, and each next best that doesn't raise the loss of the uniform mean.

    Args:
      sources: alike, as `check_alike` says.
      held_out_loss: called for each, and for each mean that is tried.
      said: told about every loss when it is known.

    Returns:
      What became of each source, in the order of `sources`. The last loss that kept one is the
      soup's.

    Raises:
      ConfigError: a loss that isn't finite.
    """
    tell = said or (lambda line: None)
    alone = []
    for source in sources:
        alone.append(_finite(held_out_loss(source), source))
        tell(f"{source.path}: held-out loss {alone[-1]:.4f}")
    order = sorted(range(len(sources)), key=lambda i: (alone[i], i))
    first, *others = order
    trials = {first: Trial(alone[first], 1, True, alone[first])}
    kept, lowest = [first], alone[first]
    for place, i in enumerate(others, 2):
        tried = [*kept, i]
        loss = _finite(held_out_loss(AveragedSource([sources[j] for j in tried])), sources[i])
        trials[i] = Trial(alone[i], place, loss <= lowest, loss)
        if trials[i].kept:
            kept, lowest = tried, loss
        verdict = "kept" if trials[i].kept else "left out"
        tell(f"with {sources[i].path} the mean's is {loss:.4f}: {verdict}")
    return [trials[i] for i in range(len(sources))]


def _finite(loss: float, source: Source) -> float:
    if not math.isfinite(loss):
        raise ConfigError(f"its held-out loss is {loss}", source=str(source.path))
    return float(loss)
