"""FLOPs of one matrix product as the compiler wrote it: a `convolution` on TPUs, or a `dot`.

A multiply and an add are 2. TPU programs write batched and transposed products as convolutions
over windows, with padding and dilation: only positions inside the input are multiplied.
"""

import functools
import math
import re

from llama_jax.planning.program_shapes import leaves
from llama_jax.planning.program_text import Computation, Instruction, ProgramError

_DIM_LABELS = re.compile(r"([0-9a-z?]+)_([0-9a-z?]+)->([0-9a-z?]+)")


def matmul_flops(where: Computation, instruction: Instruction) -> int:
    """FLOPs of a `convolution` or `dot`; 0 for anything else.

    Raises:
      ProgramError: its dimensions can't be read.
    """
    if instruction.opcode not in ("convolution", "dot"):
        return 0
    left, right = (
        leaves(where.instructions[name].shape)[0].dims for name in instruction.operands[:2]
    )
    out = leaves(instruction.shape)[0].dims
    if instruction.opcode == "dot":
        contracting = instruction.attribute("lhs_contracting_dims").strip("{}")
        sizes = [left[int(dim)] for dim in contracting.split(",") if dim]
        return 2 * math.prod(out) * math.prod(sizes)
    return _convolution(instruction, left, right, out)


def matmul_type(where: Computation, instruction: Instruction) -> str:
    """What units a product runs on: "int8" or "fp8" where both operands are, else "bf16"."""
    types = {leaves(where.instructions[name].shape)[0].dtype for name in instruction.operands[:2]}
    if types <= {"s8", "u8", "s4", "u4"}:
        return "int8"
    return "fp8" if all(each.startswith(("f8", "f4")) for each in types) else "bf16"


def _convolution(
    instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> int:
    labels = _DIM_LABELS.search(instruction.attribute("dim_labels"))
    if labels is None:
        raise ProgramError(f"convolution {instruction.name} without dim_labels")
    left_labels, right_labels, out_labels = labels[1], labels[2], labels[3]
    # `i` of the kernel is the features of one group.
    batch, features = out[out_labels.index("b")], out[out_labels.index("f")]
    products = batch * features * right[right_labels.index("i")]
    window = _Window(instruction.attribute("window"))
    for place, label in enumerate(sorted(label for label in out_labels if label.isdigit())):
        sizes = (left[left_labels.index(label)], out[out_labels.index(label)])
        products *= _positions(*sizes, *window.of(place, right[right_labels.index(label)]))
    return 2 * products


class _Window:
    """`{size=3x1 stride=2x1 pad=0_1x0_0 lhs_dilate=1x1}`; what is absent is 1, or 0 for padding."""

    def __init__(self, text: str) -> None:
        fields = (field.split("=") for field in text.strip("{}").split() if "=" in field)
        self._fields = {key: value.split("x") for key, value in fields}

    def of(self, place: int, size: int) -> tuple[int, int, int, int, int]:
        """Size, stride, low padding, dilation of the input and of the window of a dimension."""
        return (
            size,
            int(self._get("stride", place, "1")),
            int(self._get("pad", place, "0_0").split("_")[0]),
            int(self._get("lhs_dilate", place, "1")),
            int(self._get("rhs_dilate", place, "1")),
        )

    def _get(self, key: str, place: int, default: str) -> str:
        values = self._fields.get(key)
        return values[place] if values else default


@functools.lru_cache(maxsize=4096)
def _positions(
    in_size: int, out_size: int, size: int, stride: int, pad: int, dilate: int, window_dilate: int
) -> int:
    """Pairs of output position and window element that meet an element of the input."""
    if dilate == 1 and window_dilate == 1:
        return sum(
            max(0, min(size, in_size + pad - at) - max(0, pad - at))
            for at in range(0, out_size * stride, stride)
        )
    last = (in_size - 1) * dilate
    places = (
        at * stride + element * window_dilate - pad
        for at in range(out_size)
        for element in range(size)
    )
    return sum(1 for place in places if 0 <= place <= last and place % dilate == 0)
