"""One shard: writing documents of token ids, and reading a folder of them back.

A record is a document, begin and end tokens included, as little-endian ids of the manifest's
dtype. Beside the records stands an array [documents, 2] of int64: tokens and bytes of text of each
document, so that lengths are known without reading a record.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.documents import DataError
from llama_jax.data.manifest import Manifest, load_manifest

RECORDS = ".array_record"
LENGTHS = ".npy"
# A group a record: reading one document decompresses that document only.
_WRITER_OPTIONS = "group_size:1,zstd:3,max_parallelism:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,index_storage_option:in_memory"


class ShardedDocuments:
    """A finished build as `Documents`: numbered over all shards, in the order of the source.

    Files are opened on first use, so that it can be pickled into worker processes.

    Attributes:
      manifest: what the folder says of itself.
      lengths: tokens of each document, begin and end tokens included.
      text_bytes: UTF-8 bytes of text of each document.
      fingerprint: of every token.
    """

    def __init__(self, folder: Path, manifest: Manifest, sizes: np.ndarray) -> None:
        self.manifest = manifest
        self.lengths, self.text_bytes = sizes[:, 0].copy(), sizes[:, 1].copy()
        self._folder, self._readers = folder, {}
        self._begins = np.cumsum([0, *(shard.documents for shard in manifest.shards)])
        content = "".join([manifest.dtype, *(shard.sha256 for shard in manifest.shards)])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """The ids of these documents, int32, in this order; repeats are allowed.

        Raises:
          DataError: a shard that can't be read or doesn't hold what its lengths say.
        """
        wanted = np.asarray(numbers, np.int64)
        homes = np.searchsorted(self._begins, wanted, side="right") - 1
        found: list[np.ndarray] = [np.empty(0, np.int32)] * len(wanted)
        for home in np.unique(homes):
            places = np.flatnonzero(homes == home)
            records = self._records(int(home), (wanted[places] - self._begins[home]).tolist())
            for place, record in zip(places, records, strict=True):
                found[place] = self._ids(record, int(wanted[place]), int(home))
        return found

    def _records(self, shard: int, numbers: list[int]) -> Sequence[bytes]:
        try:
            return self._reader(shard).read(numbers)
        except (ValueError, RuntimeError, IndexError) as error:
            raise DataError(f"{self._path(shard)}: {error}") from None

    def _ids(self, record: bytes, number: int, shard: int) -> np.ndarray:
        ids = np.frombuffer(record, self.manifest.dtype).astype(np.int32)
        if len(ids) != self.lengths[number]:
            raise DataError(
                f"{self._path(shard)}: document {number} has {len(ids)} tokens,"
                f" {self.lengths[number]} are noted; build the folder again"
            )
        return ids

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        if shard not in self._readers:
            self._readers[shard] = ArrayRecordReader(str(self._path(shard)), _READER_OPTIONS)
        return self._readers[shard]

    def _path(self, shard: int) -> Path:
        return self._folder / (self.manifest.shards[shard].name + RECORDS)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}


def open_shards(folder: str | Path) -> ShardedDocuments:
    """The documents of a folder written by `data build`.

    Raises:
      DataError: not a finished build, or files that don't fit its manifest.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    parts = []
    for shard in manifest.shards:
        sizes = _load_sizes(folder / (shard.name + LENGTHS))
        if sizes.shape != (shard.documents, 2) or sizes[:, 0].sum() != shard.tokens:
            raise DataError(f"{folder / shard.name}{LENGTHS}: doesn't fit the manifest")
        parts.append(sizes)
    return ShardedDocuments(folder, manifest, np.concatenate(parts))


def write_records(path: Path, documents: Iterable[np.ndarray]) -> None:
    """Write documents, already of the dtype to be stored, to an ArrayRecord file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    try:
        for ids in documents:
            writer.write(ids.tobytes())
    finally:
        writer.close()


def _load_sizes(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
