"""Safetensors files: headers checked without reading a value, slices read by memory map.

Eight bytes with the header's length, little-endian; the header, JSON of each tensor's dtype, shape
and place; the values. The `safetensors` package isn't used: its NumPy side knows no bfloat16.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config.loading import nearest
from llama_jax.interchange.tensors import BFLOAT16, InterchangeError, Shape, Slices

KINDS = {
    "F32": np.dtype(np.float32),
    "BF16": BFLOAT16,
    "F16": np.dtype(np.float16),
}
# The format's own limit; also keeps a file of something else from being parsed.
_MOST_HEADER_BYTES = 100 * 10**6


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` is its first byte there."""

    name: str
    path: Path
    kind: str
    shape: Shape
    start: int

    @property
    def dtype(self) -> np.dtype:
        """That of the values.

        Raises:
          InterchangeError: one that no parameter has, such as an integer.
        """
        if self.kind not in KINDS:
            raise InterchangeError(
                f"{self.path}: tensor {self.name}: dtype {self.kind} is not supported"
                f"{nearest(self.kind, list(KINDS))}"
            )
        return KINDS[self.kind]

    def read(self, slices: Slices) -> np.ndarray:
        """A read-only view of a part; of the file only its rows are mapped, and only while used."""
        first, others = slices[0], slices[1:]
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        rows = first.stop - first.start
        if rows == 0 or row_bytes == 0:
            return np.empty((rows, *(part.stop - part.start for part in others)), self.dtype)
        # Mapped anew each time, and unmapped with the last view: pages that were read don't pile
        # up in the process's memory.
        mapped = np.memmap(
            self.path,
            mode="r",
            dtype=np.uint8,
            offset=self.start + first.start * row_bytes,
            shape=(rows * row_bytes,),
        )
        values = np.ndarray((rows, *self.shape[1:]), self.dtype, buffer=mapped)
        return values[(slice(None), *others)]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name; no value is read.

    Raises:
      InterchangeError: not a safetensors file, or one that is shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise InterchangeError(
                    f"{path}: not a safetensors file, or cut off in its header: {size} bytes"
                )
            table = json.loads(file.read(length))
    except FileNotFoundError:
        raise InterchangeError(f"{path}: no such file") from None
    except ValueError as error:
        if isinstance(error, InterchangeError):
            raise
        raise InterchangeError(f"{path}: its header is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise InterchangeError(f"{path}: its header is not an object")
    start = 8 + length
    return {
        name: _entry(name, path, about, start, size)
        for name, about in table.items()
        if name != "__metadata__"
    }


def _entry(name: str, path: Path, about: Any, start: int, size: int) -> Entry:
    try:
        shape = tuple(int(dim) for dim in about["shape"])
        begin, end = (int(place) for place in about["data_offsets"])
        kind = str(about["dtype"])
    except (KeyError, TypeError, ValueError):
        raise InterchangeError(f"{path}: tensor {name}: malformed header entry") from None
    if start + end > size:
        raise InterchangeError(
            f"{path}: tensor {name}: truncated; it ends at byte {start + end}, the file at {size}"
        )
    if kind in KINDS and end - begin != math.prod(shape) * KINDS[kind].itemsize:
        raise InterchangeError(
            f"{path}: tensor {name}: {end - begin} bytes for {kind}{list(shape)}, which takes "
            f"{math.prod(shape) * KINDS[kind].itemsize}"
        )
    return Entry(name, path, kind, shape, start + begin)
