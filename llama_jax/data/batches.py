"""Batches: the global batch of step k, given by (data, seed, k) alone, and each host's rows of it.

Grain reads ahead, in a thread or in worker processes. The whole state is the number of the next
step: resuming is a seek, on any number of hosts.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain

from llama_jax.config.run import DataConfig
from llama_jax.data.documents import (
    ChainedDocuments,
    DataError,
    Documents,
    RecentDocuments,
    slots_of,
)
from llama_jax.data.fields import Field, batch_fields
from llama_jax.data.mixture import Mixture
from llama_jax.data.packing import OnePass, Piece, PlannedRows, make_packing, plan_rows
from llama_jax.data.read_ahead import read_ahead
from llama_jax.data.rows import Batch, pack_rows, text_bytes

# Grain's datasets have a length; this one is longer than any run.
ENDLESS = 2**62
# Of documents kept in memory by each process that reads.
KEPT_BYTES = 128 * 2**20


class GlobalBatches:
    """Random access to training batches. Is pickled into worker processes."""

    def __init__(self, config: DataConfig, documents: Sequence[Documents], *, seed: int) -> None:
        """Plan the batches.

        Args:
          config: sizes, packing, names and weights of the sources.
          documents: those of each of `config.sources`, in the same order.
          seed: of every shuffle.

        Raises:
          DataError: a source without a token, named.
        """
        self._batch_size, self._fields = config.batch_size, fields_of(config, documents)
        self.documents = ChainedDocuments(documents)
        # Whether the loss reads each response at its last token; see `examples.LossOn`.
        self.reads_last = any(getattr(part, "loss_on", None) == "last" for part in documents)
        self._recent = RecentDocuments(self.documents, KEPT_BYTES)
        self._packings, self._first_documents, first = [], [], 0
        for source, part in zip(config.sources, documents, strict=True):
            try:
                key = f"{seed}/{source.name}"
                packing = make_packing(
                    config.packing,
                    part.lengths,
                    config.seq_len,
                    key,
                    slots=slots_of(part),
                    slots_per_row=config.responses_per_row,
                )
            except DataError as error:
                raise DataError(f"source '{source.name}': {error}") from None
            self._packings.append(packing)
            self._first_documents.append(first)
            first += len(part.lengths)
        weights = [source.weight for source in config.sources]
        self._mixture = Mixture(weights, [packing.tokens_per_row for packing in self._packings])

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """These rows, counted within the batch, of the global batch of a step."""
        first = step * self._batch_size
        return pack_rows([self.pieces(first + row) for row in rows], self._recent, self._fields)

    def pieces(self, row: int) -> list[Piece]:
        """What stands in a row of the global stream; documents are numbered over all sources."""
        source, row_of_source = self._mixture.locate(row)
        first = self._first_documents[source]
        return [
            Piece(first + document, start, stop)
            for document, start, stop in self._packings[source].pieces(row_of_source)
        ]


class Batches(Iterator[Batch]):
    """Iterator over one host's rows of the global batches, read ahead; see `make_batches`."""

    def __init__(
        self, ahead: "grain.DatasetIterator[Batch]", next_step: int, fingerprint: str
    ) -> None:
        self._ahead: Iterator[Batch] = ahead
        self._next_step, self._fingerprint = next_step, fingerprint

    def __next__(self) -> Batch:
        batch = next(self._ahead)
        self._next_step += 1
        return batch

    @property
    def position(self) -> dict[str, Any]:
        """What a checkpoint stores: the step whose batch `next` gives, and of which data."""
        return {"next_step": self._next_step, "fingerprint": self._fingerprint}

    def close(self) -> None:
        """Stop reading ahead and end the worker processes; there are no more batches then."""
        ahead, self._ahead = self._ahead, iter(())
        if isinstance(ahead, grain.DatasetIterator):
            ahead.close()


def make_batches(
    config: DataConfig,
    documents: Sequence[Documents],
    *,
    rows: Sequence[int],
    seed: int,
    start_step: int,
) -> Batches:
    """This host's rows of every global batch from `start_step` on, without end.

    Args:
      config: the data table of the run.
      documents: those of each of `config.sources`, in the same order.
      rows: which of the `batch_size` rows to read; see `device.host_rows`.
      seed: of every shuffle.
      start_step: 0, or what `resume_step` gives.
    """
    plan = GlobalBatches(config, documents, seed=seed)
    wanted = tuple(int(row) for row in rows)
    steps = grain.MapDataset.range(start_step, ENDLESS)
    ahead = read_ahead(
        steps.map(lambda step: plan.batch(step, wanted)),
        workers=config.workers,
        count=config.prefetch,
    )
    return Batches(ahead, start_step, fingerprint(config, documents, seed=seed))


def fields_of(config: DataConfig, documents: Sequence[Documents]) -> dict[str, Field]:
    """The fields of batches of these documents: `batch_fields`, with what is stored beside them.

    Raises:
      DataError: some have it and others don't.
    """
    has_logps = {bool(getattr(part, "has_reference_logps", False)) for part in documents}
    top_k = {int(getattr(part, "teacher_top_k", 0)) for part in documents}
    if len(has_logps) > 1 or len(top_k) > 1:
        raise DataError("reference or teacher log-probabilities are there for some sources only")
    return batch_fields(config, reference_logps=has_logps.pop(), teacher_top_k=top_k.pop())


def fingerprint(config: DataConfig, documents: Sequence[Documents], *, seed: int) -> str:
    """Differs when the batch of any step would; reading ahead doesn't count."""
    sources = [
        [source.name, source.weight, part.fingerprint]
        for source, part in zip(config.sources, documents, strict=True)
    ]
    content = [seed, config.seq_len, config.batch_size, config.packing, sources]
    if config.kind == "preferences":
        content.append(config.responses_per_row)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def resume_step(
    position: Mapping[str, Any], config: DataConfig, documents: Sequence[Documents], *, seed: int
) -> int:
    """The step to start from at a saved position.

    Raises:
      DataError: the position belongs to other data, so batches would repeat or be left out.
    """
    if position["fingerprint"] != fingerprint(config, documents, seed=seed):
        raise DataError(
            "the data is not what the checkpoint was trained on: documents, sources, weights, "
            "packing, seq_len, batch_size or seed changed, so its position has no meaning"
        )
    return int(position["next_step"])


def held_out_batches(
    config: DataConfig,
    documents: Sequence[Documents],
    *,
    rows: Sequence[int],
    count: int | None,
) -> Iterator[tuple[Batch, float]]:
    """This host's rows of the held-out batches, with the bytes of text of each *global* batch.

    One pass, each document once; the last batch is filled up with rows of padding, so that all have
    one shape. Bits a byte is the summed loss in nats / ln 2 / the summed bytes.

    Args:
      config: sizes; text is always packed by joining, in order, and conversations and preferences
        by best fit, so that the figure doesn't depend on the run's packing.
      documents: those of each of `config.held_out`.
      rows: which of the `batch_size` rows to read.
      count: take this many batches, spread evenly over the pass; None takes all.
    """
    if not documents:
        return
    chained, fields = ChainedDocuments(documents), fields_of(config, documents)
    packing = one_pass(config, chained)
    total = -(-packing.rows // config.batch_size)
    taken = total if count is None else min(count, total)
    for index in range(taken):
        first = config.batch_size * (index * total // taken)
        pieces = [packing.pieces(first + row) for row in range(config.batch_size)]
        batch = pack_rows([pieces[row] for row in rows], chained, fields)
        yield batch, text_bytes(pieces, chained)


def one_pass(config: DataConfig, documents: Documents) -> OnePass | PlannedRows:
    """Rows in which each document comes once."""
    slots = slots_of(documents)
    whole = getattr(documents, "holds_examples", False)
    if not whole:
        return OnePass(documents.lengths, config.seq_len)
    return plan_rows(
        "best_fit",
        documents.lengths,
        config.seq_len,
        "one pass",
        slots=slots,
        slots_per_row=config.responses_per_row,
    )
