"""The head of a GGUF file: its metadata as plain Python values, and where each tensor lies.

Parsed here rather than with the `gguf` package's reader: that one makes NumPy arrays of every
string, seconds and a gigabyte for a Llama 3 vocabulary, and meets a truncated file with an
IndexError. Layout: github.com/ggml-org/ggml, docs/gguf.md; little-endian, versions 2 and 3.
"""

import dataclasses
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

from gguf import GGUF_MAGIC, GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT

from llama_jax.interchange.tensors import InterchangeError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip  # noqa: E501
_STRING, _ARRAY = 8, 9
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies; `shape` is [out, in], the reverse of how GGUF lists dims."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    file: Path
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key, tensors by name; of a split file, of all its parts."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Parse a GGUF file, or all parts of a split one given any of them.

    Raises:
      InterchangeError: not GGUF, truncated, a part missing, a tensor of an unknown type.
    """
    header = _read_one(path)
    count = header.fields.get("split.count", 1)
    return header if count <= 1 else _read_split(path, count)


def _read_split(path: Path, count: int) -> GGUFHeader:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise InterchangeError(
            f"{path}: holds one of {count} parts but isn't named as such "
            f"(-00001-of-{count:05}.gguf); the other parts can't be found"
        )
    parts = []
    for number in range(1, count + 1):
        part = path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise InterchangeError(
                f"{part}: missing; it is one of the {count} parts of {path.name}"
            )
        parts.append(_read_one(part))
        if parts[-1].fields.get("split.no") != number - 1:
            raise InterchangeError(
                f"{part}: split.no: {parts[-1].fields.get('split.no')} where its name says part "
                f"{number}, counted from 0"
            )
    return _merged(parts)


def _merged(parts: list[GGUFHeader]) -> GGUFHeader:
    first, tensors = parts[0], {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise InterchangeError(f"{part.path}: {name}: also in {tensors[name].file.name}")
            tensors[name] = tensor
    expected = first.fields.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise InterchangeError(
            f"{first.path}: split.tensors.count: {expected}, but the parts hold {len(tensors)}"
        )
    return GGUFHeader(first.path, first.fields, tensors)


def _read_one(path: Path) -> GGUFHeader:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < 24:
                raise InterchangeError(f"{path}: {size} bytes are too few for a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except OSError as error:
        raise InterchangeError(f"{path}: {error.strerror}") from None


class _Parser:
    """Goes through the head once; `place` says for messages what is being read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.place = path, data, 0, "its first bytes"

    def header(self) -> GGUFHeader:
        try:
            tensor_count, key_count = self._counts()
            fields: dict[str, Any] = {}
            for _ in range(key_count):
                self._field(fields)
            infos = [self._tensor_info() for _ in range(tensor_count)]
        except struct.error:
            raise self._error(f"truncated in {self.place}") from None
        except UnicodeDecodeError:
            raise self._error(f"{self.place} is not UTF-8") from None
        alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment: {alignment!r} is no power of two")
        return GGUFHeader(self.path, fields, self._placed(infos, alignment))

    def _counts(self) -> tuple[int, int]:
        magic, version = self._take("II")
        if magic != GGUF_MAGIC:
            raise self._error("not a GGUF file: its first bytes aren't 'GGUF'")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            reason = "big-endian" if swapped in (2, 3) else f"GGUF version {version}"
            raise self._error(f"{reason}; versions 2 and 3, little-endian, can be read")
        return self._take("QQ")

    def _field(self, fields: dict[str, Any]) -> None:
        key = self._string()
        self.place = f"the value of {key}"
        if key in fields:
            raise self._error(f"{key}: given twice")
        fields[key] = self._value(*self._take("I"))
        self.place = f"the key after {key}"

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise self._error(f"{self.place} has the unknown type {kind}")
        item, count = self._take("IQ")
        if item in _SCALARS:
            return list(self._take(f"{self._fitting(count)}{_SCALARS[item]}"))
        return [self._value(item) for _ in range(self._fitting(count))]

    def _string(self) -> str:
        (length,) = self._take("Q")
        start, self.at = self.at, self.at + self._fitting(length)
        return self.data[start : self.at].decode("utf-8")

    def _fitting(self, count: int) -> int:
        """A count of things of a byte or more that can still follow."""
        if self.at + count > len(self.data):
            raise struct.error
        return count

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        self.place = "the list of tensors"
        name = self._string()
        self.place = f"the entry of tensor {name}"
        (num_dims,) = self._take("I")
        dims = self._take(f"{self._fitting(num_dims)}Q")
        kind, offset = self._take("IQ")
        try:
            return name, dims[::-1], GGMLQuantizationType(kind), offset
        except ValueError:
            raise self._error(f"{name}: unknown tensor type {kind}") from None

    def _placed(self, infos: list[Any], alignment: int) -> dict[str, GGUFTensor]:
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise self._error(f"{name}: given twice")
            tensor = GGUFTensor(name, shape, kind, self.path, start + offset)
            if shape and shape[-1] % GGML_QUANT_SIZES[kind][0]:
                raise self._error(f"{name}: rows of {shape[-1]} aren't whole {kind.name} blocks")
            if tensor.offset + tensor.nbytes > len(self.data):
                raise self._error(
                    f"{name}: truncated; it would end at byte {tensor.offset + tensor.nbytes} of "
                    f"a file of {len(self.data)}"
                )
            tensors[name] = tensor
        return tensors

    def _error(self, message: str) -> InterchangeError:
        return InterchangeError(f"{self.path}: {message}")
