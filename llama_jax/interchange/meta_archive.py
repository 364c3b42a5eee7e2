"""The zip archive that `torch.load` reads, written piece by piece.

`torch.save` needs every tensor in memory; here only the pickle, which says names, shapes and
dtypes, is made at once. Records are stored uncompressed with their checksums and lie at multiples
of 64 bytes, so that torch can map them.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.interchange.meta_torch import import_torch
from llama_jax.interchange.tensors import BFLOAT16, Shape

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    BFLOAT16: "BFloat16Storage",
}
_ALIGNMENT = 64
# Local file header before its name; and the sizes that zip64 adds to it.
_HEADER, _ZIP64, _FILL_HEAD = 30, 20, 4


class Archive:
    """A file of named tensors, whose data follow in the order in which they were named."""

    def __init__(self, path: Path, layout: dict[str, tuple[Shape, np.dtype]]) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._root = path.stem
        self._write("data.pkl", iter([_pickled(layout)]))
        self._write("byteorder", iter([b"little"]))
        self._count = 0

    def add(self, pieces: Iterator[np.ndarray]) -> None:
        """The next tensor's values in row order."""
        contiguous = (np.ascontiguousarray(piece) for piece in pieces)
        bytes_ = (piece.reshape(-1).view(np.uint8).data for piece in contiguous)
        self._write(f"data/{self._count}", bytes_)
        self._count += 1

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # The list of contents, without which no reader takes the file for whole.
        if kind is None:
            self._write("version", iter([b"3\n"]))
        self._zip.close()

    def _write(self, name: str, data: Iterator[bytes | memoryview]) -> None:
        record = zipfile.ZipInfo(f"{self._root}/{name}")
        start = self._zip.start_dir + _HEADER + len(record.filename) + _ZIP64 + _FILL_HEAD
        fill = -start % _ALIGNMENT
        record.extra = struct.pack("<2sH", b"FB", fill) + bytes(fill)
        with self._zip.open(record, "w", force_zip64=True) as out:
            for piece in data:
                out.write(piece)


class _Storage:
    """Stands for a tensor's data in the pickle."""

    def __init__(self, number: int, shape: Shape, dtype: np.dtype) -> None:
        self.number, self.shape, self.dtype = number, shape, dtype


class _Tensor:
    def __init__(self, storage: _Storage) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.storage.shape
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        rebuild = import_torch()._utils._rebuild_tensor_v2
        return rebuild, (self.storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if not isinstance(obj, _Storage):
            return None
        kind = getattr(import_torch(), _STORAGES[obj.dtype])
        return ("storage", kind, str(obj.number), "cpu", math.prod(obj.shape))


def _pickled(layout: dict[str, tuple[Shape, np.dtype]]) -> bytes:
    tensors = {
        name: _Tensor(_Storage(number, shape, dtype))
        for number, (name, (shape, dtype)) in enumerate(layout.items())
    }
    stream = io.BytesIO()
    # torch's weights-only reader knows this protocol.
    _Pickler(stream, protocol=2).dump(tensors)
    return stream.getvalue()
