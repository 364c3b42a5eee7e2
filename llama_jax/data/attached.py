"""What other models said of examples, attached as they are read: log-probabilities of responses
under a reference, and a teacher's likeliest tokens at every place.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.documents import DataError, Documents, slots_of
from llama_jax.data.examples import Example, Examples, from_document
from llama_jax.data.manifest import write_json
from llama_jax.data.packing import Piece

_TEACHER_FILE = "teacher.json"


class WithReferenceLogps:
    """Preferences with the summed log-probability of each response under a reference.

    Args:
      examples: those of one source.
      logps_ER: float32 [examples, R or fewer]; column r - 1 is of response r.

    Raises:
      DataError: another number of examples, or a response without a finite value.
    """

    holds_examples = True
    has_reference_logps = True

    def __init__(self, examples: Examples, logps_ER: np.ndarray) -> None:
        counts = examples.response_counts
        wanted = np.arange(logps_ER.shape[-1]) < counts[:, None]
        if len(logps_ER) != len(counts) or logps_ER.shape[-1] < counts.max():
            raise DataError(
                f"{logps_ER.shape} reference log-probabilities for {len(counts)} examples of up to"
                f" {counts.max()} responses"
            )
        if not np.isfinite(logps_ER[wanted]).all():
            number = int(np.argwhere(~np.isfinite(np.where(wanted, logps_ER, 0.0)))[0, 0])
            raise DataError(f"example {number} has no finite reference log-probability")
        self._examples, self._logps_ER = examples, np.asarray(logps_ER, np.float32)
        self.lengths, self.text_bytes = examples.lengths, examples.text_bytes
        self.loss_on = getattr(examples, "loss_on", "responses")
        self.slots, self.response_counts = examples.slots, counts
        digest = hashlib.sha256(np.where(wanted, self._logps_ER, 0).tobytes())
        self.fingerprint = f"{examples.fingerprint}-{digest.hexdigest()[:16]}"

    def read(self, numbers: Sequence[int]) -> list[Example]:
        """These examples, in this order."""
        found = self._examples.read(numbers)
        return [
            dataclasses.replace(
                example, reference_logps=self._logps_ER[number, : len(example.roles)]
            )
            for number, example in zip(numbers, found, strict=True)
        ]


class TeacherStore:
    """Top C tokens of a teacher at every place of a source, in two arrays on disk.

    Places of a source are counted over all its documents, in order. Any piece may be written at any
    time, so a killed computation goes on where `next_batch` says.

    Attributes:
      top_k: C.
      next_batch: what the caller has noted of its progress; None once finished.
    """

    def __init__(self, folder: Path, documents: Documents, table: dict[str, Any]) -> None:
        self._folder, self._table = folder, table
        self._begins = np.concatenate([[0], np.cumsum(documents.lengths)]).astype(np.int64)
        self.top_k: int = table["top_k"]
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def next_batch(self) -> int | None:
        """The batch to compute next."""
        return self._table["next_batch"]

    @property
    def fingerprint(self) -> str:
        """Of the teacher and what was asked of it."""
        content = json.dumps([self._table[key] for key in ("teacher", "top_k", "documents")])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def write(self, piece: Piece, ids_TC: np.ndarray, logps_TC: np.ndarray) -> None:
        """Store what the teacher said at each place of a piece."""
        start = int(self._begins[piece.document])
        for array, values in zip(self._opened("r+"), (ids_TC, logps_TC), strict=True):
            array[start + piece.start : start + piece.stop] = values

    def note(self, next_batch: int | None) -> None:
        """Everything before this batch is written; None: everything is."""
        for array in self._opened("r+"):
            array.flush()  # pyright: ignore[reportAttributeAccessIssue]
        self._table["next_batch"] = next_batch
        write_json(self._folder / _TEACHER_FILE, self._table)
        self._arrays = None

    def read(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities [n, C] of a document."""
        there = slice(int(self._begins[document]), int(self._begins[document + 1]))
        ids_TC, logps_TC = (np.array(array[there]) for array in self._opened("r"))
        return ids_TC, logps_TC

    def _opened(self, mode: str) -> tuple[np.ndarray, np.ndarray]:
        if self._arrays is None:
            shape = int(self._begins[-1]), self.top_k
            self._arrays = _memory_maps(self._folder, shape, mode)
        return self._arrays

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}


def open_teacher_store(
    folder: Path, documents: Documents, *, teacher: str, top_k: int
) -> TeacherStore:
    """The store of a source, begun if it isn't there.

    Args:
      folder: of this source's store.
      documents: the source.
      teacher: fingerprint of the model.
      top_k: C.

    Raises:
      DataError: the folder belongs to another teacher, source or C.
    """
    path = folder / _TEACHER_FILE
    table = {"teacher": teacher, "top_k": top_k, "documents": documents.fingerprint}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, value in table.items():
            if found.get(key) != value:
                detail = f"{folder} holds a teacher's tokens with {key} {found.get(key)!r}"
                raise DataError(f"{detail}, not {value!r}; delete it")
        return TeacherStore(folder, documents, found)
    folder.mkdir(parents=True, exist_ok=True)
    _memory_maps(folder, (int(np.sum(documents.lengths)), top_k), "w+")
    table["next_batch"] = 0
    write_json(path, table)
    return TeacherStore(folder, documents, table)


class WithTeacher:
    """Documents, or examples, with their teacher's likeliest tokens.

    Raises:
      DataError: a store that isn't finished.
    """

    def __init__(self, documents: Documents, store: TeacherStore) -> None:
        if store.next_batch is not None:
            raise DataError(f"the teacher's tokens end before batch {store.next_batch}")
        self._documents, self._store = documents, store
        self.lengths, self.text_bytes = documents.lengths, documents.text_bytes
        self.slots, self.teacher_top_k = slots_of(documents), store.top_k
        self.holds_examples = getattr(documents, "holds_examples", False)
        self.fingerprint = f"{documents.fingerprint}-{store.fingerprint}"

    def read(self, numbers: Sequence[int]) -> list[Example]:
        """These, in this order."""
        return [
            self._attached(found, number)
            for number, found in zip(numbers, self._documents.read(numbers), strict=True)
        ]

    def _attached(self, found: np.ndarray | Example, number: int) -> Example:
        example = from_document(found) if isinstance(found, np.ndarray) else found
        ids_TC, logps_TC = self._store.read(number)
        return dataclasses.replace(example, teacher_ids=ids_TC, teacher_logps=logps_TC)


def _memory_maps(folder: Path, shape: tuple[int, int], mode: Any) -> tuple[np.ndarray, np.ndarray]:
    ids, logps = (
        np.lib.format.open_memmap(folder / f"{name}.npy", mode, dtype, shape)
        if mode == "w+"
        else np.load(folder / f"{name}.npy", mmap_mode=mode)
        for name, dtype in (("teacher_ids", np.int32), ("teacher_logps", np.float32))
    )
    return ids, logps
