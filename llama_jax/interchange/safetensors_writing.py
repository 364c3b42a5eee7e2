"""Writing safetensors one tensor at a time; the `safetensors` package wants them all at once."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.interchange.casting import read_cast
from llama_jax.interchange.safetensors_reading import KINDS
from llama_jax.interchange.tensors import Shape, StoredTensor, head_rows, pieces

_KIND_OF = {dtype: kind for kind, dtype in KINDS.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One tensor to be written: its name in the file, and what its values come from."""

    name: str
    tensor: StoredTensor
    dtype: np.dtype

    @property
    def shape(self) -> Shape:
        """As in the source."""
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, plans: Sequence[Plan], head_dim: int) -> None:
    """A file with these tensors; no more than a piece of one is held in memory.

    Args:
      head_dim: rows of q and k are read by whole heads.

    Raises:
      InterchangeError: as `read_cast`.
    """
    header, places = _header(plans)
    with path.open("wb") as file:
        file.write(header)
        for plan in _by_source(plans):
            file.seek(len(header) + places[plan.name])
            multiple = head_dim if head_rows(plan.tensor.name) else 1
            for part in pieces(plan.shape, 4, multiple=multiple):
                values = read_cast(plan.tensor, part, plan.dtype)
                file.write(values.view(np.uint8).data)


def _by_source(plans: Sequence[Plan]) -> list[Plan]:
    """Stacked arrays of a source, of which one is held in memory, are gone through one by one."""
    return sorted(plans, key=lambda plan: plan.tensor.file)


def _header(plans: Sequence[Plan]) -> tuple[bytes, Mapping[str, int]]:
    """The header with its length in front, and each tensor's first byte after it."""
    # transformers refuses a file that doesn't say for which framework it was written.
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for plan in plans:
        places[plan.name] = end
        table[plan.name] = {
            "dtype": _KIND_OF[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [end, end + plan.nbytes],
        }
        end += plan.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    # Padded with spaces so that the values begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places
