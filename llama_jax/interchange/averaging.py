"""Checkpoints averaged: any formats in, one out, tensors read piece by piece, summed in float32.

What is averaged must be the same model with the same tokenizer. Uniform or weighted means, and
greedy soups, which keep what doesn't make the mean worse on held-out data.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config.loading import ConfigError
from llama_jax.interchange.averaging_checks import check_alike
from llama_jax.interchange.averaging_greedy import HeldOutLoss, Trial, greedy_soup
from llama_jax.interchange.averaging_source import AveragedSource, shares_of
from llama_jax.interchange.checking import check_source
from llama_jax.interchange.conversion_options import Options, check_target
from llama_jax.interchange.converting import write_source
from llama_jax.interchange.json_files import write_json
from llama_jax.interchange.loading import Progress
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.source import Source
from llama_jax.interchange.staging import staged
from llama_jax.interchange.tensors import DTYPES

AVERAGED_FILE = "averaged.json"
_DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """One checkpoint of an average.

    Attributes:
      path: as it was given.
      weight: its share; 0 where a greedy soup left it out.
      trial: what became of it in a greedy soup; None in any other mean.
    """

    path: str
    weight: float
    trial: Trial | None = None

    def to_json(self) -> dict[str, Any]:
        """As `averaged.json` has it: the trial's fields beside the others."""
        trial = {} if self.trial is None else dataclasses.asdict(self.trial)
        return {"path": self.path, "weight": self.weight, **trial}


@dataclasses.dataclass(frozen=True)
class AverageReport:
    """What an average is made of; `loss` is a greedy soup's on held-out data."""

    dst: str
    ingredients: tuple[Ingredient, ...]
    tensors: int
    parameters: int
    dtype: str
    seconds: float
    loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As `averaged.json` has it; `loss` only of a greedy soup."""
        table = {**vars(self), "ingredients": [each.to_json() for each in self.ingredients]}
        return {name: value for name, value in table.items() if value is not None}


def average(
    paths: Sequence[str | Path],
    dst: str | Path,
    *,
    to: str = "hf",
    weights: Sequence[float] | None = None,
    held_out_loss: HeldOutLoss | None = None,
    options: Options = _DEFAULTS,
    progress: Progress | None = None,
    said: Callable[[str], None] | None = None,
) -> AverageReport:
    """Write the average of checkpoints as `dst` in the format `to`.

    Args:
      paths: at least two, as `open_source` takes them.
      weights: one each; uniform by default.
      held_out_loss: makes a greedy soup, in which weights have no place; see `greedy_soup`. It is
        given float32 means: what is written in a narrower dtype is rounded afterwards.
      options: as those of a conversion, but that logits aren't compared. By default values are
        written in the dtype that the first one's are stored in.
      progress: told the bytes read for writing, and those of all.
      said: told about the losses of a greedy soup as they come.

    Raises:
      ConfigError: too few, weights that make no sense, a `dst` that is there already.
      InterchangeError: a checkpoint at fault, or of another model than the first, or with another
        tokenizer; the difference is named.
    """
    begun_s = time.perf_counter()
    _check(paths, weights, held_out_loss)
    options.check(to)
    for path in paths:
        check_target(path, Path(dst), to, options)
    sources = [open_source(path) for path in paths]
    tokenizer = check_alike(sources, tokenizers=options.tokenizer)
    for source in sources:
        check_source(source)
    trials: list[Trial] = []
    if held_out_loss is not None:
        trials = greedy_soup(sources, held_out_loss, said)
        weights = [float(trial.kept) for trial in trials]
    mean = AveragedSource(sources, weights, tokenizer=tokenizer, progress=progress)
    options = dataclasses.replace(options, dtype=options.dtype or _stored_dtype(sources[0]))
    report = AverageReport(
        dst=str(dst),
        ingredients=tuple(
            map(Ingredient, map(str, paths), mean.shares, trials or (None,) * len(paths))
        ),
        tensors=len(mean.tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in mean.tensors.values()),
        dtype=options.dtype or "",
        seconds=0.0,
        loss=min((trial.soup_loss for trial in trials if trial.kept), default=None),
    )
    with staged(Path(dst)) as new:
        write_source(mean, new, to, options, tokenizer)
        report = dataclasses.replace(report, seconds=time.perf_counter() - begun_s)
        if new.is_dir():
            write_json(new / AVERAGED_FILE, report.to_json())
    return report


def _check(
    paths: Sequence[str | Path], weights: Sequence[float] | None, held_out_loss: HeldOutLoss | None
) -> None:
    if len(paths) < 2:
        raise ConfigError("an average is of at least two checkpoints")
    if held_out_loss is not None and weights is not None:
        raise ConfigError("a greedy soup's weights are its own", key="--weights")
    shares_of(weights, len(paths))


def _stored_dtype(source: Source) -> str:
    """That of most values; float32 where they are in quantised blocks."""
    sizes = dict.fromkeys(DTYPES, 0)
    for tensor in source.tensors.values():
        for name, dtype in DTYPES.items():
            sizes[name] += math.prod(tensor.shape) * (tensor.dtype == dtype)
    return max(sizes, key=lambda name: sizes[name])
