"""Examples on disk: `examples.array_record`, a record an example, their sizes, and a manifest.

`sizes.npy` is [examples, 5] of int64: places, bytes of text of the targets, responses, pairs, and
what is trained on. The manifest is written last, so its presence says that the build is complete.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.documents import DataError
from llama_jax.data.examples import Example, LossOn, example_from_bytes
from llama_jax.data.manifest import MANIFEST_FILE, FileEntry, write_json
from llama_jax.data.record_summary import Summary, summary_from_table

EXAMPLES = "examples.array_record"
SIZES = "sizes.npy"
FORMAT = 2
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,index_storage_option:in_memory"


@dataclasses.dataclass(frozen=True)
class ExamplePlan:
    """What decides every byte of a build but the files themselves.

    Attributes:
      format: version of the layout and of what encoding gives.
      tokenizer: its fingerprint.
      chat_format: its name, and of a template the hash of its text behind it.
      seq_len, responses_per_row: what an example must fit.
      source: the source's table.
      files: hash of the names and sizes of its files.
    """

    format: int
    tokenizer: str
    chat_format: str
    seq_len: int
    responses_per_row: int
    source: dict[str, Any]
    files: str


@dataclasses.dataclass(frozen=True)
class ExampleManifest:
    """Everything about a finished build.

    Attributes:
      tokenizer: its fingerprint.
      sha256: of the examples' file.
      summary: the figures.
      plan, files: what it was made from.
    """

    tokenizer: str
    sha256: str
    summary: Summary
    plan: ExamplePlan
    files: list[FileEntry]

    @property
    def skipped(self) -> dict[str, int]:
        """Records left out, by reason."""
        return self.summary.skipped

    @property
    def problems(self) -> list[str]:
        """The first few of each reason, with file and line."""
        return self.summary.problems


class StoredExamples:
    """A finished build as `Examples`. The file is opened on first use, so that it can be pickled.

    Attributes:
      manifest: what the folder says of itself.
      lengths, text_bytes, slots, response_counts, fingerprint: see `Examples`.
      holds_examples: that these aren't documents, which may be cut.
      loss_on: what the loss of preferences reads.
    """

    holds_examples = True

    def __init__(
        self, folder: Path, manifest: ExampleManifest, sizes: np.ndarray, loss_on: LossOn
    ) -> None:
        self.manifest = manifest
        self.loss_on: LossOn = loss_on
        self.lengths, self.text_bytes = sizes[:, 0].copy(), sizes[:, 1].copy()
        self.response_counts = sizes[:, 2].copy()
        self.slots = np.maximum(sizes[:, 2], sizes[:, 3])
        self.fingerprint = f"{manifest.sha256[:16]}-{loss_on}"
        self._path, self._reader = folder / EXAMPLES, None

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, numbers: Sequence[int]) -> list[Example]:
        """These examples, in this order; repeats are allowed.

        Raises:
          DataError: a file that can't be read or doesn't hold what its sizes say.
        """
        wanted = [int(number) for number in numbers]
        if not wanted:
            return []
        try:
            records = self._records().read(wanted)
        except (ValueError, RuntimeError, IndexError) as error:
            raise DataError(f"{self._path}: {error}") from None
        found = [example_from_bytes(record) for record in records]
        for number, example in zip(wanted, found, strict=True):
            if len(example) != self.lengths[number]:
                raise DataError(f"{self._path}: example {number} isn't as long as was noted")
        return [example.trained_on(self.loss_on) for example in found]

    def _records(self) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        if self._reader is None:
            self._reader = ArrayRecordReader(str(self._path), _READER_OPTIONS)
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


def open_examples(folder: Path, loss_on: LossOn) -> StoredExamples:
    """The examples of a finished build.

    Raises:
      DataError: not a finished build, or files that don't fit its manifest.
    """
    manifest = load_example_manifest(folder)
    try:
        sizes = np.load(folder / SIZES)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / SIZES}: {error}") from None
    if sizes.shape != (manifest.summary.examples, 5):
        raise DataError(f"{folder / SIZES}: doesn't fit the manifest")
    return StoredExamples(folder, manifest, sizes, loss_on)


def save_example_manifest(manifest: ExampleManifest, folder: Path) -> None:
    """Write `manifest.json` so that it is there whole or not at all."""
    write_json(folder / MANIFEST_FILE, dataclasses.asdict(manifest))


def load_example_manifest(folder: Path) -> ExampleManifest:
    """The manifest of a finished build.

    Raises:
      DataError: no manifest, or one that isn't understood.
    """
    path = folder / MANIFEST_FILE
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return ExampleManifest(
            tokenizer=table["tokenizer"],
            sha256=table["sha256"],
            summary=summary_from_table(table["summary"]),
            plan=ExamplePlan(**table["plan"]),
            files=[FileEntry(**entry) for entry in table["files"]],
        )
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; not a finished build") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a manifest of examples: {error}") from None
