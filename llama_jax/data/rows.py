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
"""

from collections.abc import Sequence

import numpy as np

from llama_jax.data.documents import Documents
from llama_jax.data.fields import FIELDS as FIELDS
from llama_jax.data.packing import Piece

Batch = dict[str, np.ndarray]


def pack_rows(rows: Sequence[Sequence[Piece]], documents: Documents, seq_len: int) -> Batch:
    """The batch of these rows, each field [len(rows), seq_len]; see the picture above."""
    batch = {name: np.zeros((len(rows), seq_len), dtype) for name, dtype in FIELDS.items()}
    numbers = sorted({piece.document for pieces in rows for piece in pieces})
    tokens_of = dict(zip(numbers, documents.read(numbers), strict=True))
    for row, pieces in enumerate(rows):
        place = 0
        for segment, piece in enumerate(pieces, start=1):
            _write(batch, row, place, segment, piece, tokens_of[piece.document])
            place += piece.stop - piece.start
    return batch


def _write(
    batch: Batch, row: int, place: int, segment: int, piece: Piece, document: np.ndarray
) -> None:
    count = piece.stop - piece.start
    targets = document[piece.start + 1 : piece.stop + 1]
    predicted = slice(place, place + len(targets))
    here = slice(place, place + count)
    batch["tokens"][row, here] = document[piece.start : piece.stop]
    batch["targets"][row, predicted] = targets
    batch["loss_mask"][row, predicted] = 1.0
    batch["positions"][row, here] = np.arange(count)
    batch["segment_ids"][row, here] = segment


def text_bytes(rows: Sequence[Sequence[Piece]], documents: Documents) -> float:
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
