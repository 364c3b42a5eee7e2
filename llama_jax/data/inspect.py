"""What the model will see: rows of a batch decoded, with borders, positions and targets.

Made from the same plan and arrays as training; only the looks are decided here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import DataConfig
from llama_jax.data.batches import GlobalBatches
from llama_jax.data.documents import Documents
from llama_jax.data.examples import ROLE_NUMBERS
from llama_jax.data.packing import Piece
from llama_jax.data.rows import Batch
from llama_jax.tokenizers import Tokenizer

COLOURS = ("cyan", "yellow", "green", "magenta", "blue")
# Text files may hold escape codes; a terminal shall show them, not obey them.
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: "\u2421"
}
NO_TARGET = "\u2298"
# Around what is trained on, where that isn't everything; behind what a reward model reads.
TRAINED = "\u27e6", "\u27e7"
READ = "\u25c2"
RECORDS_LEGEND = (
    f"\u2503n\u2503 begins segment n of the row; {TRAINED[0]}trained on{TRAINED[1]}; "
    f"{READ} the loss reads the response here"
)
LEGEND = (
    "\u2503n\u2503 begins document n of the row, a colour each; "
    f"reversed and followed by {NO_TARGET}: nothing is predicted from this token"
)


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

    Raises:
      ConfigError: a step below 0, or no row.
    """
    plan = GlobalBatches(config, documents, seed=seed)
    shown = _shown_rows(config, step, rows)
    batch = plan.batch(step, shown)
    for row in shown:
        pieces = plan.pieces(step * config.batch_size + row)
        console.rule(Text(f"step {step}, row {row} of {config.batch_size}"))
        console.print(_border_table(_borders(config, plan, batch, row, pieces)))
        if config.kind == "text":
            console.print(_coloured(batch, row, tokenizer), soft_wrap=True)
        else:
            console.print(_marked(batch, row, tokenizer, plan), soft_wrap=True)
    console.rule()
    legend = LEGEND if config.kind == "text" else RECORDS_LEGEND
    console.print(legend, style="dim", markup=False)
    console.print(totals(batch), highlight=False)


def batch_table(
    config: DataConfig,
    documents: Sequence[Documents],
    tokenizer: Tokenizer,
    *,
    seed: int,
    step: int,
    rows: int,
) -> dict[str, Any]:
    """The same rows as plain lists and numbers; arguments and errors as `show_batch`."""
    plan = GlobalBatches(config, documents, seed=seed)
    shown = _shown_rows(config, step, rows)
    batch = plan.batch(step, shown)
    table = []
    for row in shown:
        pieces = plan.pieces(step * config.batch_size + row)
        borders = _borders(config, plan, batch, row, pieces)
        for border in borders:
            first, last = border["places"]
            border["text"] = tokenizer.decode(batch["tokens"][row, first : last + 1].tolist())
        arrays = {name: array[row].tolist() for name, array in batch.items()}
        table.append({"row": row, "documents": borders, **arrays})
    return {"step": step, "batch_size": config.batch_size, "rows": table}


def totals(batch: Batch) -> str:
    """One line of counts."""
    segments = batch["segment_ids"]
    tokens, targets = np.count_nonzero(segments), np.count_nonzero(batch["loss_mask"])
    return (
        f"{segments.shape[0]} rows of {segments.shape[1]}: {tokens} tokens, {targets} targets, "
        f"{segments.size - tokens} padding ({1 - tokens / segments.size:.2%}), "
        f"{int(segments.max(axis=1).sum())} documents or parts of one"
    )


def _shown_rows(config: DataConfig, step: int, rows: int) -> range:
    for name, value, least in (("step", step, 0), ("rows", rows, 1)):
        if value < least:
            raise ConfigError(f"{value} is below {least}", key=name)
    return range(min(rows, config.batch_size))


def _borders(
    config: DataConfig, plan: GlobalBatches, batch: Batch, row: int, pieces: Sequence[Piece]
) -> list[dict[str, Any]]:
    """Each segment of the row: whence, which of its tokens, and where they stand (inclusive)."""
    borders, place = [], 0
    for piece in pieces:
        part, number = plan.documents.home(piece.document)
        span = range(place, place + piece.stop - piece.start)
        for segment in np.unique(batch["segment_ids"][row, span]).tolist():
            places = np.flatnonzero(batch["segment_ids"][row] == segment)
            first = piece.start - place
            border = {
                "segment": segment,
                "source": config.sources[part].name,
                "document": number,
                "length": int(plan.documents.lengths[piece.document]),
                "tokens": (places[[0, -1]] + first).tolist(),
                "places": places[[0, -1]].tolist(),
                "positions": batch["positions"][row, places[[0, -1]]].tolist(),
                "targets": int(batch["loss_mask"][row, places].sum()),
            }
            if "roles" in batch:
                border["responses"] = _responses(batch, row, places)
            borders.append(border)
        place = span.stop
    return borders


def _responses(batch: Batch, row: int, places: np.ndarray) -> list[str]:
    """The responses of a segment, as `1 chosen`."""
    numbers = np.unique(batch["response_ids"][row, places])
    names = {number: name for name, number in ROLE_NUMBERS.items()}
    return [
        f"{number} {names[int(batch['roles'][row, number - 1])]}"
        for number in numbers[numbers > 0].tolist()
    ]


def _border_table(borders: Sequence[dict[str, Any]]) -> Table:
    columns = ["", "source", "document", "its tokens", "places", "positions", "targets"]
    with_responses = any("responses" in border for border in borders)
    table = Table(*columns, *(["responses"] if with_responses else []))
    for border in borders:
        spans = ("{}-{}".format(*border[name]) for name in ("tokens", "places", "positions"))
        tokens, places, positions = spans
        table.add_row(
            str(border["segment"]),
            border["source"],
            str(border["document"]),
            f"{tokens} of {border['length']}",
            places,
            positions,
            str(border["targets"]),
            *([", ".join(border["responses"])] if with_responses else []),
            style=_colour(border["segment"]),
        )
    return table


def _marked(batch: Batch, row: int, tokenizer: Tokenizer, plan: GlobalBatches) -> Text:
    """A row of conversations or preferences: what is trained on stands between marks."""
    segments, mask = batch["segment_ids"][row], batch["loss_mask"][row] > 0
    read, trained = mask, np.zeros_like(mask)
    if not plan.reads_last:
        read, trained = trained, np.append(False, mask[:-1])
    kinds = np.stack([segments, trained, np.append(0, np.cumsum(read)[:-1])])
    begins = np.flatnonzero(np.any(np.diff(kinds, axis=1, prepend=-1) != 0, axis=0))
    stops = [*begins[1:].tolist(), len(segments)]
    text, last = Text(), 0
    for start, stop in zip(begins.tolist(), stops, strict=True):
        segment = int(segments[start])
        if segment == 0:
            text.append(f"\u2503 {stop - start} padding", style="dim")
            continue
        if segment != last:
            text.append(f"\u2503{segment}\u2503", style="bold")
        last = segment
        words = tokenizer.decode(batch["tokens"][row, start:stop].tolist()).translate(VISIBLE)
        if trained[start]:
            words = f"{TRAINED[0]}{words}{TRAINED[1]}"
        text.append(words, style=_colour(segment) if trained[start] else "dim")
        if read[stop - 1]:
            text.append(READ, style=f"bold {_colour(segment)}")
    return text


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
