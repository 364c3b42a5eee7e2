"""Shapes as HLO text writes them: element types, dimensions and memory spaces of each leaf.

A layout's `S(n)` names the memory: none is HBM, 1 is VMEM on the chip, 5 is host memory; the rest
are scalar memory and semaphores.
"""

import dataclasses
import functools
import math
import re

HBM, VMEM, HOST = 0, 1, 5

_BITS = {
    **{"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16},
    **{"s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64},
    **{"c64": 64, "c128": 128, "token": 0, "opaque": 0, "s1": 1, "u1": 1},
}
_LEAF = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=\s]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array: element type, dimensions, memory space and the layout's text."""

    dtype: str
    dims: tuple[int, ...]
    space: int
    layout: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return element_bits(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes, without the padding of tiles."""
        return (self.elements * self.bits + 7) // 8


def element_bits(dtype: str) -> int:
    """Bits of one element of an HLO type.

    Raises:
      ValueError: a type that isn't known.
    """
    if dtype in _BITS:
        return _BITS[dtype]
    if dtype.startswith("f8"):
        return 8
    if dtype.startswith("f4"):
        return 4
    raise ValueError(f"HLO element type {dtype!r} is not known")


@functools.lru_cache(maxsize=65536)
def leaves(shape: str) -> tuple[Leaf, ...]:
    """The arrays of a shape, those of a tuple in order, nested tuples flattened."""
    return tuple(_leaf(match) for match in _LEAF.finditer(shape))


def _leaf(match: re.Match[str]) -> Leaf:
    dtype, dims, layout = match[1], match[2], match[3] or ""
    space = _SPACE.search(layout)
    sizes = tuple(int(size.strip(" <=")) for size in dims.split(",") if size.strip(" <="))
    return Leaf(dtype, sizes, int(space[1]) if space else HBM, layout)


def nbytes(shape: str, space: int | None = None) -> int:
    """Bytes of all leaves, or of those in one memory space."""
    return sum(leaf.nbytes for leaf in leaves(shape) if space is None or leaf.space == space)
