"""Checkpoints averaged: any formats in, one out, tensors read piece by piece, summed in float32.

What is averaged must be the same model with the same tokenizer. Uniform or weighted means, and the
greedy soup of Wortsman et al. (arXiv 2203.05482, recipe 1).
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config.loading import ConfigError
from llama_jax.interchange.averaging_checks import check_alike
from llama_jax.interchange.checking import check_source
from llama_jax.interchange.conversion_options import Options, check_target
from llama_jax.interchange.converting import write_source
from llama_jax.interchange.json_files import write_json
from llama_jax.interchange.loading import Progress
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.source import Source
from llama_jax.interchange.staging import staged
from llama_jax.interchange.tensors import DTYPES, Slices, StoredTensor, canonical_shapes
from llama_jax.tokenizers import Tokenizer

AVERAGED_FILE = "averaged.json"
_DEFAULTS = Options()
# Of a checkpoint on held-out data; the higher, the better.
Score = Callable[[Source], float]


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """One checkpoint of an average; its weight is 0 where a greedy soup left it out."""

    path: str
    weight: float
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class AverageReport:
    """What an average is made of; `score` is that of the whole, where there was a score."""

    dst: str
    ingredients: tuple[Ingredient, ...]
    tensors: int
    parameters: int
    dtype: str
    seconds: float
    score: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As `averaged.json` has it."""
        return dataclasses.asdict(self)


class AveragedSource:
    """A `Source` whose tensors are weighted means, in float32, made when they are read.

    Architecture, tokenizer, chat template and generation defaults are the first one's.

    Args:
      sources: alike, as `check_alike` says.
      weights: one each, at least 0; what counts is their shares.
      progress: told the bytes read, and those of all tensors.

    Raises:
      ConfigError: weights that aren't such.
    """

    format = "average"

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.shares = shares_of(weights, len(sources))
        self._sources, self._tokenizer, self._progress = sources, tokenizer, progress
        first = sources[0]
        self.path, self.config = first.path, first.config
        self.chat_template, self.generation = first.chat_template, first.generation
        self.tensors = {name: self._mean(name) for name in canonical_shapes(first.config)}
        self._done = 0
        read = sum(share > 0 for share in self.shares)
        self._total = sum(tensor.nbytes for tensor in self.tensors.values()) * read
        self._lock = threading.Lock()

    def stored_name(self, name: str) -> str:
        """The first one's."""
        return self._sources[0].stored_name(name)

    def load_tokenizer(self) -> Tokenizer:
        """The one given, else the first one's."""
        return self._tokenizer or self._sources[0].load_tokenizer()

    def _mean(self, name: str) -> StoredTensor:
        parts = [source.tensors[name] for source in self._sources]

        def read(slices: Slices) -> np.ndarray:
            total: np.ndarray | None = None
            for share, tensor in zip(self.shares, parts, strict=True):
                if share:
                    values = tensor.read(slices).astype(np.float32)
                    self._count(values.nbytes)
                    values *= np.float32(share)
                    total = values if total is None else np.add(total, values, out=total)
            assert total is not None
            return total

        return dataclasses.replace(
            parts[0],
            dtype=np.dtype(np.float32),
            kind="F32",
            read=read,
            has_nan=lambda: any(tensor.has_nan() for tensor in parts),
        )

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def average(
    paths: Sequence[str | Path],
    dst: str | Path,
    *,
    to: str = "hf",
    weights: Sequence[float] | None = None,
    score: Score | None = None,
    options: Options = _DEFAULTS,
    progress: Progress | None = None,
) -> AverageReport:
    """Write the average of checkpoints as `dst` in the format `to`.

    Args:
      paths: at least two, as `open_source` takes them.
      weights: one each; uniform by default.
      score: makes a greedy soup, in which weights have no place: the best one, and each next best
        that doesn't lower the score of the uniform mean.
      options: as those of a conversion, but that logits aren't compared. By default values are
        written in the dtype that the first one's are stored in.

    Raises:
      ConfigError: too few, weights that make no sense, a `dst` that is there already.
      InterchangeError: a checkpoint at fault, or of another model than the first, or with another
        tokenizer; the difference is named.
    """
    begun_s = time.perf_counter()
    _check(paths, weights, score)
    options.check(to)
    for path in paths:
        check_target(path, Path(dst), to, options)
    sources = [open_source(path) for path in paths]
    tokenizer = check_alike(sources, tokenizers=options.tokenizer)
    for source in sources:
        check_source(source)
    if score is None:
        soup = Soup(tuple(shares_of(weights, len(paths))), (), None)
    else:
        soup = greedy_soup(sources, score)
    mean = AveragedSource(sources, soup.shares, tokenizer=tokenizer, progress=progress)
    options = dataclasses.replace(options, dtype=options.dtype or _stored_dtype(sources[0]))
    scores = soup.scores or (None,) * len(paths)
    report = AverageReport(
        dst=str(dst),
        ingredients=tuple(map(Ingredient, map(str, paths), soup.shares, scores)),
        tensors=len(mean.tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in mean.tensors.values()),
        dtype=options.dtype or "",
        seconds=0.0,
        score=soup.score,
    )
    with staged(Path(dst)) as new:
        write_source(mean, new, to, options, tokenizer)
        report = dataclasses.replace(report, seconds=time.perf_counter() - begun_s)
        if new.is_dir():
            write_json(new / AVERAGED_FILE, report.to_json())
    return report


@dataclasses.dataclass(frozen=True)
class Soup:
    """Shares of the ingredients, each one's own score, and the score of the whole."""

    shares: tuple[float, ...]
    scores: tuple[float, ...]
    score: float | None


def greedy_soup(sources: Sequence[Source], score: Score) -> Soup:
    """The best one, and each next best that doesn't lower the score of the uniform mean.

    Raises:
      ConfigError: a score that isn't finite.
    """
    alone = [_finite(score(source), source) for source in sources]
    order = sorted(range(len(sources)), key=lambda i: (-alone[i], i))
    chosen, best = order[:1], alone[order[0]]
    for i in order[1:]:
        tried = [*chosen, i]
        mean = AveragedSource([sources[j] for j in tried])
        reached = _finite(score(mean), sources[i])
        if reached >= best:
            chosen, best = tried, reached
    shares = tuple(1 / len(chosen) if i in chosen else 0.0 for i in range(len(sources)))
    return Soup(shares, tuple(alone), best)


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that make 1 together; uniform by default.

    Raises:
      ConfigError: another number of them, one below 0 or not finite, or all 0.
    """
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ConfigError(f"{len(weights)} weights for {count} checkpoints", key="--weights")
    wrong = next((w for w in weights if not (math.isfinite(w) and w >= 0)), None)
    if wrong is not None:
        raise ConfigError(f"{wrong} is not a weight; at least 0", key="--weights")
    total = math.fsum(weights)
    if not total:
        raise ConfigError("all are 0", key="--weights")
    return [weight / total for weight in weights]


def _check(
    paths: Sequence[str | Path], weights: Sequence[float] | None, score: Score | None
) -> None:
    if len(paths) < 2:
        raise ConfigError("an average is of at least two checkpoints")
    if score is not None and weights is not None:
        raise ConfigError("a greedy soup's weights are its own", key="--weights")
    shares_of(weights, len(paths))


def _finite(score: float, source: Source) -> float:
    if not math.isfinite(score):
        raise ConfigError(f"its held-out score is {score}", source=str(source.path))
    return float(score)


def _stored_dtype(source: Source) -> str:
    """That of most values; float32 where they are in quantised blocks."""
    sizes = dict.fromkeys(DTYPES, 0)
    for tensor in source.tensors.values():
        for name, dtype in DTYPES.items():
            sizes[name] += math.prod(tensor.shape) * (tensor.dtype == dtype)
    return max(sizes, key=lambda name: sizes[name])
