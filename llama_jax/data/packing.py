"""Packing: which tokens of which documents stand in row r of a source, for any r at any time.

Rows are endless: epoch follows epoch, every epoch has its own order, and every token of every
document stands in exactly one row of each epoch. Nothing here reads a token; `rows` does that.
A row is found without walking to it, so a resumed run seeks, whatever the number of hosts.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from llama_jax.data.documents import DataError
from llama_jax.data.filling import best_fit_decreasing, best_fit_with_slots

Plan = TypeVar("Plan")
# A row of a small source may run from one epoch into the next, and threads read a little ahead.
EPOCHS_KEPT = 3


class Piece(NamedTuple):
    """Tokens `start` to `stop` (not included) of one document."""

    document: int
    start: int
    stop: int


class Packing(Protocol):
    """The rows of one source."""

    tokens_per_row: float  # mean of an epoch, padding left out

    def pieces(self, row: int) -> list[Piece]:
        """What stands in a row, left to right; at most seq_len tokens together."""
        ...


def make_packing(
    kind: Literal["concat", "best_fit", "none"],
    lengths: np.ndarray,
    seq_len: int,
    key: str,
    *,
    slots: np.ndarray | None = None,
    slots_per_row: int = 0,
) -> Packing:
    """Endless rows of `seq_len` tokens over the documents.

    Args:
      kind: `concat` joins the documents of an epoch in shuffled order and cuts the stream into
        rows: no padding; a document that runs over a row's end goes on in the next row.
        `best_fit` keeps documents whole (those longer than a row are cut first) and fills rows by
        best-fit decreasing; the places left over are padding. `none` gives each piece of those a
        row of its own.
      lengths: tokens of each document.
      seq_len: T.
      key: text that seeds every shuffle, such as the run's seed and the source's name.
      slots: what each document takes of `slots_per_row`, where rows have a second limit.
      slots_per_row: that limit; `concat` has none.

    Raises:
      DataError: there are no tokens.
    """
    if not np.sum(lengths):
        raise DataError("there is not one token in the documents")
    lengths = np.asarray(lengths, np.int64)
    if kind == "concat":
        return ConcatPacking(lengths, seq_len, key)
    rows = plan_rows(kind, lengths, seq_len, key, slots=slots, slots_per_row=slots_per_row)
    return PlannedPacking(rows, key)


class TokenStream:
    """Documents joined in an order, as one stream of tokens addressed by position."""

    def __init__(self, lengths: np.ndarray, order: np.ndarray) -> None:
        self._order = order
        self._ends = np.cumsum(lengths[order])

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The pieces between two positions of the stream."""
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin, end = int(self._ends[place - 1]) if place else 0, int(self._ends[place])
            if start < end:  # an empty document holds no position
                until = min(stop, end)
                yield Piece(int(self._order[place]), start - begin, until - begin)
                start = until
            place += 1


class ConcatPacking:
    """Rows cut from one endless stream, epoch after epoch; the rows of an epoch are shuffled too.

    Row r of the stream is its tokens [r * T, r * T + T); it belongs to the epoch that holds its
    first token. Without the second shuffle a long book would fill a whole batch by itself.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, key: str) -> None:
        self._lengths, self._seq_len, self._key = lengths, seq_len, key
        self._epoch_tokens = int(lengths.sum())
        self._streams = ByEpoch(self._stream)
        self._row_orders = ByEpoch(self._row_order)
        self.tokens_per_row = float(seq_len)

    def pieces(self, row: int) -> list[Piece]:
        """The row's pieces: always seq_len tokens."""
        epoch = row * self._seq_len // self._epoch_tokens
        first = self._first_row(epoch)
        start = (first + int(self._row_orders(epoch)[row - first])) * self._seq_len
        stop, pieces = start + self._seq_len, []
        while start < stop:
            epoch, offset = divmod(start, self._epoch_tokens)
            count = min(stop - start, self._epoch_tokens - offset)
            pieces += self._streams(epoch).pieces(offset, offset + count)
            start += count
        return pieces

    def _first_row(self, epoch: int) -> int:
        return -(-epoch * self._epoch_tokens // self._seq_len)

    def _stream(self, epoch: int) -> TokenStream:
        return TokenStream(
            self._lengths, permutation(len(self._lengths), f"{self._key}/documents/{epoch}")
        )

    def _row_order(self, epoch: int) -> np.ndarray:
        count = self._first_row(epoch + 1) - self._first_row(epoch)
        return permutation(count, f"{self._key}/rows/{epoch}")


class PlannedRows:
    """Rows of whole documents (or of pieces no longer than a row), each piece in one row."""

    def __init__(
        self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray, row_of: np.ndarray
    ) -> None:
        by_row = np.argsort(row_of, kind="stable")
        self._columns = documents[by_row], starts[by_row], stops[by_row]
        self._begins = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
        self.tokens, self.rows = int((stops - starts).sum()), len(self._begins) - 1

    def pieces(self, row: int) -> list[Piece]:
        """The row's pieces, longest first; none past the last row."""
        if row >= self.rows:
            return []
        held = range(int(self._begins[row]), int(self._begins[row + 1]))
        return [Piece(*(int(column[i]) for column in self._columns)) for i in held]


def plan_rows(
    kind: Literal["best_fit", "none"],
    lengths: np.ndarray,
    seq_len: int,
    key: str,
    *,
    slots: np.ndarray | None = None,
    slots_per_row: int = 0,
) -> PlannedRows:
    """Fill rows once; arguments as `make_packing`."""
    documents, starts = cut(lengths, seq_len)
    sizes = np.minimum(lengths[documents] - starts, seq_len)
    # Equal sizes stand in random order: documents of one file don't all meet in one row.
    shuffled = permutation(len(sizes), f"{key}/pieces")
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    if kind == "none":
        row_of = np.arange(len(order))
    elif slots is None or not slots.any():
        row_of = best_fit_decreasing(sizes[order], seq_len)
    else:
        needs = slots[documents[order]]
        row_of = best_fit_with_slots(sizes[order], needs, seq_len, slots_per_row)
    documents, starts = documents[order], starts[order]
    return PlannedRows(documents, starts, starts + sizes[order], row_of)


class PlannedPacking:
    """Rows filled once by best-fit decreasing; an epoch is a shuffle of those rows.

    Documents that share a row don't see each other, so which of them share one is of no
    consequence, and one plan serves all epochs: they have the same number of rows, and any row
    of any epoch is found without planning the epochs before it.
    """

    def __init__(self, planned: PlannedRows, key: str) -> None:
        self._planned = planned
        self._row_orders = ByEpoch(lambda epoch: permutation(planned.rows, f"{key}/rows/{epoch}"))
        self.tokens_per_row = float(planned.tokens) / planned.rows

    def pieces(self, row: int) -> list[Piece]:
        """The row's pieces, longest first."""
        epoch, place = divmod(row, self._planned.rows)
        return self._planned.pieces(int(self._row_orders(epoch)[place]))


class OnePass:
    """Every document once, in order, cut into rows; the last row is short. For held-out data."""

    def __init__(self, lengths: np.ndarray, seq_len: int) -> None:
        self._stream = TokenStream(lengths, np.arange(len(lengths)))
        self._tokens, self._seq_len = int(lengths.sum()), seq_len
        self.rows = -(-self._tokens // seq_len)

    def pieces(self, row: int) -> list[Piece]:
        """The row's pieces; none past the last row."""
        start = min(row * self._seq_len, self._tokens)
        return list(self._stream.pieces(start, min(start + self._seq_len, self._tokens)))


def cut(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Document number and start of each piece when no piece may be longer than seq_len."""
    counts = -(-lengths // seq_len)
    documents = np.repeat(np.arange(len(lengths)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return documents, (np.arange(len(documents)) - first) * seq_len


def permutation(count: int, key: str) -> np.ndarray:
    """The numbers below `count` in an order given by the key alone.

    Drawn from Philox's raw 64-bit words: NumPy promises those for ever, but not that
    `Generator.permutation` gives the same order in another version, on which a run may resume.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    words = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(words, kind="stable")


class ByEpoch(Generic[Plan]):
    """What `make` gives for an epoch, kept for the newest few; it may be called from threads."""

    def __init__(self, make: Callable[[int], Plan]) -> None:
        self._make = make
        self._kept: dict[int, Plan] = {}

    def __call__(self, epoch: int) -> Plan:
        """The epoch's plan."""
        plan = self._kept.get(epoch)
        if plan is None:
            # Two threads may both make it: the same plan twice, which costs time and nothing else.
            plan = self._kept[epoch] = self._make(epoch)
            for old in sorted(self._kept.copy())[:-EPOCHS_KEPT]:
                self._kept.pop(old, None)
        return plan
