"""Tensors of a Meta checkpoint from its one or several `.pth` files, one per model-parallel rank.

Each is joined along the dim that its ranks cut, only where asked for. [O, I] is a matrix
[out, in]; H head dim.
"""

import dataclasses
import re
from functools import partial
from pathlib import Path

import numpy as np

from llama_jax.interchange.meta_names import ROPE_FREQS, from_meta, shard_dim
from llama_jax.interchange.meta_rows import check_whole_heads, to_half_split
from llama_jax.interchange.meta_torch import map_tensors
from llama_jax.interchange.tensors import (
    BFLOAT16,
    EMBEDDING,
    InterchangeError,
    Shape,
    Slices,
    StoredTensor,
    any_nan,
    head_rows,
)

_FILE = re.compile(r"consolidated(?:\.(?P<rank>\d+))?\.pth")
_KINDS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", BFLOAT16: "BF16"}


@dataclasses.dataclass(frozen=True)
class Joined:
    """One tensor of all ranks.

    Attributes:
      name: as stored.
      parts: each rank's array.
      files: where each is from, for messages.
      dim: along which they are joined; None where each rank has the whole.
      copies: ranks next to each other that hold the same rows (more ranks than KV heads).
    """

    name: str
    parts: tuple[np.ndarray, ...]
    files: tuple[str, ...]
    dim: int | None
    copies: int = 1

    @property
    def shape(self) -> Shape:
        """Of the joined tensor."""
        shape = list(self.parts[0].shape)
        if self.dim is not None:
            shape[self.dim] = sum(part.shape[self.dim] for part in self.parts[:: self.copies])
        return tuple(shape)

    def read(self, wanted: Slices) -> np.ndarray:
        """That part of the joined tensor, only those rows and columns from disk.

        Raises:
          InterchangeError: ranks that should hold the same values don't.
        """
        if self.dim is None:
            return self._same(0, len(self.parts), wanted)
        found, start = [], 0
        for first in range(0, len(self.parts), self.copies):
            size = self.parts[first].shape[self.dim]
            inside = _overlap(wanted[self.dim], start, start + size)
            start += size
            if inside is not None:
                part = tuple(inside if d == self.dim else s for d, s in enumerate(wanted))
                found.append(self._same(first, first + self.copies, part))
        return found[0] if len(found) == 1 else np.concatenate(found, self.dim)

    def _same(self, first: int, end: int, wanted: Slices) -> np.ndarray:
        values = self.parts[first][wanted]
        for rank in range(first + 1, end):
            if not np.array_equal(values, self.parts[rank][wanted], equal_nan=True):
                raise InterchangeError(
                    f"{self.files[rank]}: tensor {self.name} differs from that of "
                    f"{Path(self.files[first]).name}, of which it is a copy"
                )
        return values


def rank_files(folder: Path) -> list[Path]:
    """The `.pth` files in the order of their ranks.

    Raises:
      InterchangeError: none there, or a rank's missing.
    """
    ranks: dict[int, Path] = {}
    for path in folder.glob("consolidated*.pth"):
        if (found := _FILE.fullmatch(path.name)) is not None:
            ranks[int(found["rank"] or 0)] = path
    if not ranks:
        raise InterchangeError(f"{folder}: no consolidated.00.pth")
    for rank in range(max(ranks)):
        if rank not in ranks:
            raise InterchangeError(
                f"{folder / f'consolidated.{rank:02}.pth'}: missing, though there is "
                f"{ranks[max(ranks)].name}"
            )
    return [ranks[rank] for rank in sorted(ranks)]


def joined_tensors(files: list[Path], embed_dim: int, kv_rows: int) -> list[Joined]:
    """All tensors, by what their shapes say of how they were cut; rotary tables left out.

    Args:
      files: of each rank.
      embed_dim: D, the width of an embedding that is cut by rows.
      kv_rows: rows of k and v of the whole model; where there are more, ranks hold copies.

    Raises:
      InterchangeError: a file at fault, or ranks with other tensors than the first's.
    """
    by_rank = [map_tensors(path) for path in files]
    for path, tensors in zip(files[1:], by_rank[1:], strict=True):
        _check_alike(files[0], by_rank[0], path, tensors)
    where = tuple(str(path) for path in files)
    tensors = [
        Joined(
            name, tuple(tensors[name] for tensors in by_rank), where, _dim(name, array, embed_dim)
        )
        for name, array in by_rank[0].items()
        if name != ROPE_FREQS
    ]
    return [_without_copies(tensor, kv_rows) for tensor in tensors]


def stored(tensor: Joined, head_dim: int) -> StoredTensor:
    """The canonical form, q and k in half-split order."""
    name = from_meta(tensor.name)
    permuted = name is not None and head_rows(name)
    read = partial(_read_heads, tensor, head_dim) if permuted else tensor.read
    dtype = tensor.parts[0].dtype
    heads = head_dim if permuted else 1
    return StoredTensor(
        name=name or tensor.name,
        stored_name=tensor.name,
        file=tensor.files[0],
        shape=tensor.shape,
        dtype=dtype,
        kind=_KINDS[dtype],
        read=read,
        has_nan=partial(any_nan, read, tensor.shape, dtype, multiple=heads),
    )


def _read_heads(tensor: Joined, head_dim: int, part: Slices) -> np.ndarray:
    check_whole_heads(part[0], head_dim, f"{tensor.files[0]}: {tensor.name}")
    return to_half_split(tensor.read(part), head_dim)


def _overlap(wanted: slice, start: int, end: int) -> slice | None:
    first, last = max(wanted.start, start), min(wanted.stop, end)
    return slice(first - start, last - start) if first < last else None


def _dim(stored_name: str, array: np.ndarray, embed_dim: int) -> int | None:
    name = from_meta(stored_name)
    if name is None or array.ndim < 2:
        return None
    if name == EMBEDDING:
        # Cut by rows from Llama 3 on, by columns before.
        return 0 if array.shape[1] == embed_dim else 1
    return shard_dim(name)


def _without_copies(tensor: Joined, kv_rows: int) -> Joined:
    name = from_meta(tensor.name) or ""
    rows = tensor.shape[0]
    more = rows > kv_rows and rows % kv_rows == 0
    if not name.endswith(("k_proj", "v_proj")) or not more:
        return tensor
    copies = rows // kv_rows
    return dataclasses.replace(tensor, copies=copies) if len(tensor.parts) % copies == 0 else tensor


def _check_alike(
    first: Path, ours: dict[str, np.ndarray], path: Path, theirs: dict[str, np.ndarray]
) -> None:
    for name in (ours.keys() ^ theirs.keys()) - {ROPE_FREQS}:
        holder, lacking = (first, path) if name in ours else (path, first)
        raise InterchangeError(f"{lacking}: tensor {name} is missing, though {holder.name} has it")
    for name, array in theirs.items():
        if name in ours and (array.shape, array.dtype) != (ours[name].shape, ours[name].dtype):
            raise InterchangeError(
                f"{path}: tensor {name} is {array.dtype} {list(array.shape)}, but in {first.name} "
                f"{ours[name].dtype} {list(ours[name].shape)}"
            )
