"""Rows as arrays: tokens, targets, loss mask, positions and segment ids of a packed batch.

B: rows, T: places in a row. Two documents [a b c e] and [d e] in a row of 8:

    tokens         a  b  c  e  d  e  0  0
    targets        b  c  e  0  e  0  0  0
    loss_mask      1  1  1  0  1  0  0  0
    positions      0  1  2  3  0  1  0  0
    segment_ids    1  1  1  1  2  2  0  0

Nothing is predicted across a border: the last token of a document has no target. A document cut
at the end of a row does have one there, its own next token, and its rest starts another row at
position 0. Segment id 0 is padding.

A conversation is a document of which less counts. A preference brings a segment for each response,
here to [a] the chosen [c e] and the rejected [d e], of which the ends don't count:

    tokens         a  c  e  a  d  e  0  0        chosen   [1 0 0 ..]   by pair
    targets        c  e  0  d  e  0  0  0        rejected [2 0 0 ..]
    loss_mask      1  0  0  1  0  0  0  0        strength [2 0 0 ..]
    segment_ids    1  1  1  2  2  2  0  0        roles    [1 2 0 ..]   by response
    response_ids   1  1  0  2  2  0  0  0

A reward model reads each response at its last token: loss_mask is 0 0 1 0 0 1 0 0, and response_ids
has the response there too. Responses are numbered within a row, from 1.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from llama_jax.data.examples import Example
from llama_jax.data.fields import FIELDS as FIELDS
from llama_jax.data.fields import Field
from llama_jax.data.packing import Piece

Batch = dict[str, np.ndarray]


class Readable(Protocol):
    """Documents, or examples."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        ...

    @property
    def text_bytes(self) -> np.ndarray:
        """Bytes of text of each."""
        ...

    def read(self, numbers: Sequence[int]) -> Sequence[np.ndarray | Example]:
        """These, in this order."""
        ...


def pack_rows(
    rows: Sequence[Sequence[Piece]], documents: Readable, fields: Mapping[str, Field]
) -> Batch:
    """The batch of these rows; see the pictures above.

    Args:
      rows: what stands in each, left to right.
      documents: what the pieces are of.
      fields: of a global batch; each array has as many rows as given here instead.
    """
    batch = {
        name: np.zeros((len(rows), *field.shape[1:]), field.dtype) for name, field in fields.items()
    }
    numbers = sorted({piece.document for pieces in rows for piece in pieces})
    found = dict(zip(numbers, documents.read(numbers), strict=True))
    for row, pieces in enumerate(rows):
        here = _Row({name: array[row] for name, array in batch.items()})
        for number, start, stop in pieces:
            document = found[number]
            if isinstance(document, np.ndarray):
                here.add_document(document, start, stop)
            else:
                here.add(document, start, stop)
    return batch


class _Row:
    """A row of each array, filled from the left."""

    def __init__(self, arrays: Batch) -> None:
        self._arrays = arrays
        self._place = self._segments = self._responses = self._pairs = 0

    def add_document(self, tokens: np.ndarray, start: int, stop: int) -> None:
        """Write a part of a document: as `add`, for pretraining's many tokens at half the cost."""
        targets = tokens[start + 1 : stop + 1]
        here = slice(self._place, self._place + stop - start)
        predicted = slice(self._place, self._place + len(targets))
        self._arrays["tokens"][here] = tokens[start:stop]
        self._arrays["targets"][predicted] = targets
        self._arrays["loss_mask"][predicted] = 1.0
        self._arrays["positions"][here] = np.arange(stop - start)
        self._arrays["segment_ids"][here] = self._segments + 1
        self._place, self._segments = here.stop, self._segments + 1

    def add(self, example: Example, start: int, stop: int) -> None:
        """Write an example, or a part of one that a document became."""
        segments = example.segments
        follows = np.append(segments[1:] == segments[:-1], False)
        begins = np.searchsorted(segments, segments)
        columns = {
            "tokens": example.tokens,
            "targets": np.where(follows, np.append(example.tokens[1:], 0), 0),
            "loss_mask": example.counts,
            # Those of a document's rest start at 0 again.
            "positions": np.arange(len(segments)) - np.maximum(begins, start),
            "segment_ids": segments.astype(np.int32) + self._segments,
        }
        if "response_ids" in self._arrays:
            numbers = example.responses.astype(np.int32)
            columns["response_ids"] = np.where(numbers, numbers + self._responses, 0)
        if "teacher_ids" in self._arrays:
            columns |= _teacher(example)
        there = slice(self._place, self._place + stop - start)
        for name, column in columns.items():
            self._arrays[name][there] = column[start:stop]
        self._place += stop - start
        self._segments += int(segments[-1])
        if "roles" in self._arrays:
            self._add_responses(example)

    def _add_responses(self, example: Example) -> None:
        first, pairs = self._responses, example.pairs.astype(np.int32)
        there = slice(first, first + len(example.roles))
        self._arrays["roles"][there] = example.roles
        if "reference_logps" in self._arrays:
            assert example.reference_logps is not None
            self._arrays["reference_logps"][there] = example.reference_logps
        self._responses = there.stop
        here = slice(self._pairs, self._pairs + len(pairs))
        self._arrays["chosen"][here] = pairs[:, 0] + first
        self._arrays["rejected"][here] = pairs[:, 1] + first
        self._arrays["strength"][here] = pairs[:, 2]
        self._pairs = here.stop


def _teacher(example: Example) -> dict[str, np.ndarray]:
    assert example.teacher_ids is not None
    assert example.teacher_logps is not None
    return {"teacher_ids": example.teacher_ids, "teacher_logps": example.teacher_logps}


def text_bytes(rows: Sequence[Sequence[Piece]], documents: Readable) -> float:
    """Bytes of text that the targets of these rows stand for.

    A document's bytes are spread evenly over its targets: exact once all of it has been counted,
    an estimate for one cut by a batch's end.
    """
    pieces = np.array([piece for pieces in rows for piece in pieces], np.int64).reshape(-1, 3)
    numbers, starts, stops = pieces.T
    lengths = documents.lengths[numbers].astype(np.int64)
    targets = np.minimum(stops, lengths - 1) - starts
    shares = targets / np.maximum(lengths - 1, 1)
    return float(np.sum(documents.text_bytes[numbers] * shares))
