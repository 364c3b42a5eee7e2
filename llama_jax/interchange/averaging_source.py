"""The weighted mean of checkpoints as one more checkpoint, made while it is read.

A tensor's piece is read from each and summed in float32; no more than such pieces is held.
"""

import dataclasses
import math
import threading
from collections.abc import Sequence

import numpy as np

from llama_jax.config.loading import ConfigError
from llama_jax.interchange.loading import Progress
from llama_jax.interchange.source import Source
from llama_jax.interchange.tensors import Slices, StoredTensor, canonical_shapes
from llama_jax.tokenizers import Tokenizer


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
