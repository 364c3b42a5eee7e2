"""What the model will see: rows of a batch decoded, with borders, positions and targets.

Made from the same plan and arrays as training; only the looks are decided here.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_jax.config.run import DataConfig, RunConfig
from llama_jax.data.batches import GlobalBatches
from llama_jax.data.documents import Documents
from llama_jax.data.packing import Piece
from llama_jax.data.rows import Batch
from llama_jax.data.sources import open_documents, open_tokenizer
from llama_jax.tokenizers import Tokenizer

COLOURS = ("cyan", "yellow", "green", "magenta", "blue")
# Text files may hold escape codes; a terminal shall show them, not obey them.
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: "\u2421"
}
NO_TARGET = "\u2298"
LEGEND = (
    "\u2503n\u2503 begins document n of the row, a colour each; "
    f"reversed and followed by {NO_TARGET}: nothing is predicted from this token"
)


def inspect(config: RunConfig, run_dir: Path, *, step: int, rows: int, console: Console) -> None:
    """Print the first rows of the batch of a step of a run; see `show_batch`.

    The run need not have begun: its tokenizer and shards are made in `run_dir` if they aren't
    there, as training would make them.
    """
    tokenizer = open_tokenizer(config, run_dir)
    documents = open_documents(
        config.data,
        "sources",
        tokenizer,
        run_dir,
        workers=os.cpu_count() or 1,
        progress=console.is_terminal,
    )
    show_batch(config.data, documents, tokenizer, console, seed=config.seed, step=step, rows=rows)


def show_batch(
    config: DataConfig,
    documents: Sequence[Documents],
    tokenizer: Tokenizer,
    console: Console,
    *,
    seed: int,
    step: int,
    rows: int,
) -> None:
    """Print the first `rows` rows of the global batch of a step.

    Args:
      config: the data table of the run.
      documents: those of each of `config.sources`.
      tokenizer: the one that they were made with.
      console: where to.
      seed: the run's.
      step: which batch, counted from 0 as in training.
      rows: how many; no more than the batch has.
    """
    plan = GlobalBatches(config, documents, seed=seed)
    shown = range(min(rows, config.batch_size))
    batch = plan.batch(step, shown)
    for row in shown:
        pieces = plan.pieces(step * config.batch_size + row)
        console.rule(Text(f"step {step}, row {row} of {config.batch_size}"))
        console.print(_border_table(config, plan, batch, row, pieces))
        console.print(_coloured(batch, row, tokenizer), soft_wrap=True)
    console.rule()
    console.print(LEGEND, style="dim", markup=False)
    console.print(totals(batch), highlight=False)


def totals(batch: Batch) -> str:
    """One line of counts."""
    segments = batch["segment_ids"]
    tokens, targets = np.count_nonzero(segments), np.count_nonzero(batch["loss_mask"])
    return (
        f"{segments.shape[0]} rows of {segments.shape[1]}: {tokens} tokens, {targets} targets, "
        f"{segments.size - tokens} padding ({1 - tokens / segments.size:.2%}), "
        f"{int(segments.max(axis=1).sum())} documents or parts of one"
    )


def _border_table(
    config: DataConfig, plan: GlobalBatches, batch: Batch, row: int, pieces: Sequence[Piece]
) -> Table:
    table = Table("", "source", "document", "its tokens", "places", "positions", "targets")
    for segment, piece in enumerate(pieces, start=1):
        places = np.flatnonzero(batch["segment_ids"][row] == segment)
        positions = batch["positions"][row, places]
        part, number = plan.documents.home(piece.document)
        length = int(plan.documents.lengths[piece.document])
        table.add_row(
            str(segment),
            config.sources[part].name,
            str(number),
            f"{piece.start}-{piece.stop - 1} of {length}",
            f"{places[0]}-{places[-1]}",
            f"{positions[0]}-{positions[-1]}",
            str(int(batch["loss_mask"][row, places].sum())),
            style=_colour(segment),
        )
    return table


def _coloured(batch: Batch, row: int, tokenizer: Tokenizer) -> Text:
    text = Text()
    last = 0
    for segment, has_target, ids in _runs(batch, row):
        if segment == 0:
            text.append(f"\u2503 {len(ids)} padding", style="dim")
            continue
        if segment != last:
            text.append(f"\u2503{segment}\u2503", style="bold")
        last = segment
        words = tokenizer.decode(ids).translate(VISIBLE)
        if has_target:
            text.append(words, style=_colour(segment))
        else:
            text.append(words + NO_TARGET, style=f"{_colour(segment)} reverse")
    return text


def _runs(batch: Batch, row: int) -> Iterator[tuple[int, bool, list[int]]]:
    """Segment, whether there are targets, and ids, of each stretch where the first two are one."""
    kinds = np.stack([batch["segment_ids"][row], batch["loss_mask"][row] > 0])
    begins = np.flatnonzero(np.any(np.diff(kinds, axis=1, prepend=-1) != 0, axis=0))
    for start, ids in zip(begins, np.split(batch["tokens"][row], begins[1:]), strict=True):
        yield int(kinds[0, start]), bool(kinds[1, start]), ids.tolist()


def _colour(segment: int) -> str:
    return COLOURS[(segment - 1) % len(COLOURS)]
