"""One pass over a source, to compute something of every response or place of it once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.config.data import DataConfig
from llama_jax.data.batches import fields_of, one_pass
from llama_jax.data.documents import Documents
from llama_jax.data.packing import Piece
from llama_jax.data.rows import Batch, pack_rows


class OrderedBatch(NamedTuple):
    """A batch of the pass, and whose tokens it holds. All but `batch` are of the global batch.

    Attributes:
      batch: this host's rows.
      pieces: what stands in each row, left to right.
      examples: int64 [B, R], the number of the example that the response of each column belongs
        to; -1 where there is none.
      responses: int32 [B, R], which of that example's responses it is, from 1; 0 where none.
    """

    batch: Batch
    pieces: list[list[Piece]]
    examples: np.ndarray
    responses: np.ndarray


def ordered_batches(
    config: DataConfig, documents: Documents, *, rows: Sequence[int], start: int = 0
) -> Iterator[OrderedBatch]:
    """Every document or example of a source once.

    Args:
      config: sizes.
      documents: those of one source.
      rows: which of the `batch_size` rows to read.
      start: the batch to begin with; the batches are the same whatever it is.
    """
    fields = fields_of(config, [documents])
    packing = one_pass(config, documents)
    counts = getattr(documents, "response_counts", np.zeros(len(documents.lengths), np.int64))
    for index in range(start, -(-packing.rows // config.batch_size)):
        first = index * config.batch_size
        pieces = [packing.pieces(first + row) for row in range(config.batch_size)]
        batch = pack_rows([pieces[row] for row in rows], documents, fields)
        yield OrderedBatch(batch, pieces, *_owners(pieces, counts, config.responses_per_row))


def _owners(
    pieces: Sequence[Sequence[Piece]], counts: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    examples = np.full((len(pieces), slots), -1, np.int64)
    responses = np.zeros((len(pieces), slots), np.int32)
    for row, held in enumerate(pieces):
        numbers = [piece.document for piece in held]
        owners = np.repeat(numbers, counts[numbers]).astype(np.int64) if held else []
        examples[row, : len(owners)] = owners
        responses[row, : len(owners)] = [i + 1 for n in numbers for i in range(counts[n])]
    return examples, responses
