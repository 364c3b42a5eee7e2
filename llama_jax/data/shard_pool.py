"""Making single shards in worker processes, and knowing which are already there.

A shard's files are written under temporary names and renamed; its entry, a small JSON file, comes
last. Entries go once the manifest, which holds them all, is written.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from llama_jax.data.documents import DataError
from llama_jax.data.manifest import ShardEntry, write_json
from llama_jax.data.shards import LENGTHS, RECORDS, write_records
from llama_jax.data.tokenising import EncodeDocuments, encode_documents, worker_encoder
from llama_jax.data.workers import follow_parent
from llama_jax.tokenizers import Tokenizer

_ENTRY = ".entry.json"


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """The texts of a shard and their hash."""

    name: str
    texts: Sequence[str]
    text_sha256: str

    @classmethod
    def of(cls, index: int, texts: Sequence[str]) -> "ShardTask":
        """The task of the `index`-th shard."""
        digest = hashlib.sha256()
        for text in texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return cls(f"shard-{index:05d}", texts, digest.hexdigest())


class ShardPool:
    """Makes shards in processes, or here with fewer than two; keeps the order of the tasks.

    Holds at most two tasks a worker, so that reading doesn't run away from tokenising.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, dtype: str, workers: int) -> None:
        self._maker = ShardMaker(folder, tokenizer, dtype)
        self._pending: collections.deque[concurrent.futures.Future[ShardEntry]] = (
            collections.deque()
        )
        self._entries: list[ShardEntry] = []
        self._limit = 2 * workers
        self._processes = _make_processes(self._maker, workers) if workers > 1 else None

    def __enter__(self) -> "ShardPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=error is not None)

    def keep(self, entry: ShardEntry) -> None:
        """Take a shard that is already there."""
        done: concurrent.futures.Future[ShardEntry] = concurrent.futures.Future()
        done.set_result(entry)
        self._add(done)

    def submit(self, task: ShardTask) -> None:
        """Have a shard made; waits while too many are under way."""
        if self._processes is None:
            self.keep(self._maker.make(task))
        else:
            self._add(self._processes.submit(_make_in_worker, task))

    def finish(self) -> list[ShardEntry]:
        """All shards in order."""
        while self._pending:
            self._entries.append(self._pending.popleft().result())
        return self._entries

    def _add(self, future: "concurrent.futures.Future[ShardEntry]") -> None:
        self._pending.append(future)
        while len(self._pending) > self._limit:
            self._entries.append(self._pending.popleft().result())


class ShardMaker:
    """Tokenises the texts of a task and writes its shard."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, dtype: str) -> None:
        self._folder, self.tokenizer, self._dtype = folder, tokenizer, np.dtype(dtype)

    def make(self, task: ShardTask, encode: EncodeDocuments | None = None) -> ShardEntry:
        """Write the shard's files, its entry last; `encode` is a worker's own way to the ids."""
        encoded = encode(task.texts) if encode else encode_documents(self.tokenizer, task.texts)
        documents = [np.array(ids, self._dtype) for ids in encoded]
        sizes = np.array(
            [
                [len(ids), len(text.encode())]
                for ids, text in zip(documents, task.texts, strict=True)
            ],
            np.int64,
        )
        records, lengths = (self._temporary(task, end) for end in (RECORDS, LENGTHS))
        write_records(records, documents)
        np.save(lengths, sizes)
        tokens, size = sizes.sum(axis=0).tolist()
        entry = ShardEntry(
            task.name,
            len(documents),
            tokens,
            size,
            task.text_sha256,
            _hash(records),
            _hash(lengths),
        )
        records.replace(self._folder / (task.name + RECORDS))
        lengths.replace(self._folder / (task.name + LENGTHS))
        write_json(self._folder / (task.name + _ENTRY), dataclasses.asdict(entry))
        return entry

    def _temporary(self, task: ShardTask, end: str) -> Path:
        return self._folder / f".tmp-{os.getpid()}-{task.name}{end}"


def finished_shard(folder: Path, task: ShardTask) -> ShardEntry | None:
    """The entry of a shard that an earlier, interrupted build has made, if it is whole.

    Raises:
      DataError: it was made of other text.
    """
    try:
        table = json.loads((folder / (task.name + _ENTRY)).read_text(encoding="utf-8"))
        entry = ShardEntry(**table)
    except (OSError, ValueError, TypeError):
        return None
    if entry.text_sha256 != task.text_sha256:
        raise DataError(
            f"{folder / task.name} was made of other text than the source has now; "
            "delete the folder or build into another one"
        )
    return entry if is_whole(folder, entry) else None


def is_whole(folder: Path, shard: ShardEntry) -> bool:
    """Whether both files of a shard hold the bytes that its entry says."""
    pairs = ((RECORDS, shard.sha256), (LENGTHS, shard.lengths_sha256))
    paths = [(folder / (shard.name + end), wanted) for end, wanted in pairs]
    return all(path.is_file() and _hash(path) == wanted for path, wanted in paths)


def remove_entries(folder: Path) -> None:
    """Remove what only an unfinished build needs."""
    for path in folder.glob(f"*{_ENTRY}"):
        path.unlink(missing_ok=True)


def has_entries(folder: Path) -> bool:
    """Whether an unfinished build has left any shard to go on from."""
    return any(folder.glob(f"*{_ENTRY}"))


def remove_temporary(folder: Path) -> None:
    """Remove files that a killed build was writing."""
    for path in folder.glob(".tmp-*"):
        path.unlink(missing_ok=True)


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _make_processes(maker: ShardMaker, workers: int) -> concurrent.futures.ProcessPoolExecutor:
    # Spawned: a fork of a process with JAX's threads may hang.
    return concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(maker,),
    )


_worker_maker: ShardMaker | None = None
_worker_encode: EncodeDocuments | None = None


def _start_worker(maker: ShardMaker) -> None:
    global _worker_maker, _worker_encode
    follow_parent()
    _worker_maker, _worker_encode = maker, worker_encoder(maker.tokenizer)


def _make_in_worker(task: ShardTask) -> ShardEntry:
    assert _worker_maker is not None
    return _worker_maker.make(task, _worker_encode)
