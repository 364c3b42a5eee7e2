"""Rows of special tokens that a base model never trained: found, told, and given a start.

A vocabulary keeps rows for tokens that pretraining never shows, such as those of chat formats.
Their rows of embedding and head are (near) zero or all alike: what a chat is trained on would begin
as one meaningless token. V vocabulary, D width, S special tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from llama_jax.interchange.source import Source
from llama_jax.interchange.tensors import EMBEDDING, LM_HEAD, Slices, StoredTensor, pieces
from llama_jax.tokenizers import Tokenizer

# Of the median length of ordinary rows, of which so many are looked at.
_NEAR_ZERO, _LOOKED_AT = 0.01, 512
# Two rows are alike whose difference is this small beside them.
_ALIKE = 1e-3
# Of the spread of trained rows: tells new rows apart, and is nothing beside what they share.
_NOISE = 0.02
_NAMED = 6


@dataclasses.dataclass(frozen=True)
class UntrainedRows:
    """Special tokens whose rows of one matrix were never trained.

    Attributes:
      tensor: canonical name, "embedding" or "lm_head".
      stored_name: as in the checkpoint.
      near_zero, alike: ids by the tokens' names; the second are those of rows like another's.
    """

    tensor: str
    stored_name: str
    near_zero: Mapping[str, int]
    alike: Mapping[str, int]

    @property
    def ids(self) -> list[int]:
        """All of them, in order."""
        return sorted({*self.near_zero.values(), *self.alike.values()})

    def __str__(self) -> str:
        parts = []
        for why, rows in (("near zero", self.near_zero), ("alike", self.alike)):
            if rows:
                names = ", ".join(list(rows)[:_NAMED])
                more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
                parts.append(f"{names}{more} ({why})")
        return f"{self.stored_name}: rows of special tokens that were never trained: " + "; ".join(
            parts
        )


def find_untrained_rows(source: Source, tokenizer: Tokenizer) -> tuple[UntrainedRows, ...]:
    """Those of the embedding and of a head of its own; empty where all rows were trained."""
    special = {name: i for name, i in tokenizer.special.items() if i < source.config.vocab_size}
    tensors = [source.tensors[name] for name in (EMBEDDING, LM_HEAD) if name in source.tensors]
    found = (_untrained(tensor, special, tokenizer) for tensor in tensors)
    return tuple(rows for rows in found if rows.ids)


def started_at_mean(
    source: Source, found: Sequence[UntrainedRows], tokenizer: Tokenizer, seed: int
) -> dict[str, StoredTensor]:
    """The tensors, by canonical name, with these rows at the mean of the ordinary ones.

    With noise of a fiftieth of their spread, so that no two are the same.

    Args:
      found: of `find_untrained_rows`.
      seed: of the noise; a row's own depends on its id alone, not on what else is new.
    """
    changed = {}
    for number, rows in enumerate(found):
        tensor = source.tensors[rows.tensor]
        mean_D, std_D = _mean_and_spread(tensor, _ordinary(tokenizer, tensor))
        new = {}
        for row in rows.ids:
            noise_D = np.random.default_rng([seed, number, row]).standard_normal(len(mean_D))
            new[row] = (mean_D + _NOISE * std_D * noise_D).astype(tensor.dtype)
        changed[rows.tensor] = _with_rows(tensor, new)
    return changed


class StartedSource:
    """A `Source` whose untrained special rows start at the mean of the others."""

    def __init__(self, source: Source, tokenizer: Tokenizer, seed: int) -> None:
        """As a run with `init.special_rows = "mean"` starts from `source`.

        Args:
          tokenizer, seed: the run's.
        """
        self.format, self.path, self.config = source.format, source.path, source.config
        self.chat_template, self.generation = source.chat_template, source.generation
        found = find_untrained_rows(source, tokenizer)
        self.tensors = {**source.tensors, **started_at_mean(source, found, tokenizer, seed)}
        self._source = source

    def stored_name(self, name: str) -> str:
        """The source's."""
        return self._source.stored_name(name)

    def load_tokenizer(self) -> Tokenizer:
        """The source's."""
        return self._source.load_tokenizer()


def _untrained(
    tensor: StoredTensor, special: Mapping[str, int], tokenizer: Tokenizer
) -> UntrainedRows:
    names = sorted(special, key=lambda name: special[name])
    rows_SD = _rows(tensor, [special[name] for name in names])
    norms_S = np.linalg.norm(rows_SD, axis=1)
    ordinary = _ordinary(tensor=tensor, tokenizer=tokenizer)
    step = max(len(ordinary) // _LOOKED_AT, 1)
    usual = float(np.median(np.linalg.norm(_rows(tensor, ordinary[::step]), axis=1)))
    zero_S = norms_S < _NEAR_ZERO * usual
    alike_S = _has_a_double(rows_SD, norms_S) & ~zero_S
    near_zero, alike = (
        {name: special[name] for name, is_so in zip(names, flags, strict=True) if is_so}
        for flags in (zero_S, alike_S)
    )
    return UntrainedRows(tensor.name, tensor.stored_name, near_zero, alike)


def _has_a_double(rows_SD: np.ndarray, norms_S: np.ndarray) -> np.ndarray:
    # By differences, not by products: those of nearly equal rows would cancel.
    flags_S = np.zeros(len(rows_SD), bool)
    for row in range(len(rows_SD)):
        apart_S = np.linalg.norm(rows_SD - rows_SD[row], axis=1)
        apart_S[row] = np.inf
        flags_S[row] = bool((apart_S <= _ALIKE * norms_S[row]).any())
    return flags_S


def _ordinary(tokenizer: Tokenizer, tensor: StoredTensor) -> np.ndarray:
    """Ids of tokens that text is made of; rows that only fill the matrix up aren't among them."""
    known = np.arange(min(tokenizer.vocab_size, tensor.shape[0]))
    return np.setdiff1d(known, list(tokenizer.special.values()))


def _rows(tensor: StoredTensor, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    width = slice(0, tensor.shape[1])
    empty = np.empty((0, tensor.shape[1]), np.float32)
    read = [tensor.read((slice(int(i), int(i) + 1), width)).astype(np.float32) for i in ids]
    return np.concatenate([empty, *read])


def _mean_and_spread(tensor: StoredTensor, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    taken_V = np.zeros(tensor.shape[0], bool)
    taken_V[ids] = True
    sum_D, squares_D = np.zeros((2, tensor.shape[1]))
    for part in pieces(tensor.shape, 8):
        rows = tensor.read(part)[taken_V[part[0]]].astype(np.float64)
        sum_D += rows.sum(axis=0)
        squares_D += (rows**2).sum(axis=0)
    mean_D = sum_D / max(len(ids), 1)
    return mean_D, np.sqrt(np.maximum(squares_D / max(len(ids), 1) - mean_D**2, 0))


def _with_rows(tensor: StoredTensor, new: Mapping[int, np.ndarray]) -> StoredTensor:
    def read(part: Slices) -> np.ndarray:
        values = tensor.read(part)
        inside = [row for row in new if part[0].start <= row < part[0].stop]
        if inside:
            values = values.copy()
            for row in inside:
                values[row - part[0].start] = new[row][part[1]]
        return values

    return dataclasses.replace(tensor, read=read)
