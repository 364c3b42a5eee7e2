"""Pallas kernels in a compiled program: which, and the FLOPs of those that are attention.

The compiler counts nothing in them. An attention kernel's matrix products are counted by formula
from the shapes of its queries and keys: 2 products in a forward pass, 3 for dq, 4 for dk and dv,
5 in a backward pass that makes all three, each of 2 T S H FLOPs a head, half of that if causal.
"""

import math
import re
from typing import NamedTuple

from llama_jax.planning.program_shapes import Leaf, leaves
from llama_jax.planning.program_text import Computation, Instruction

TARGET = "tpu_custom_call"

_NUMBER = re.compile(r"(\.\d+|\.clone|\.remat\d*)+$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ATTENTION = re.compile(r"splash|flash|attention|_mha_|_mqa_", re.IGNORECASE)
_COST = re.compile(r'"cost_estimate":\{"flops":"?(\d+)')
_LAYOUT = re.compile(r"\"([qkv])_layout\\?\": (\d)")
_FUSED = re.compile(r"use_fused_bwd_kernel\\?\": (true|false)")
_SEQUENCE_MINOR = "2"
_FLOATS = ("bf16", "f16", "f32", "f8e4m3fn", "f8e5m2")


class Kernel(NamedTuple):
    """One call: its name without numbers, whether it is attention, and its FLOPs if known."""

    name: str
    attention: bool
    flops: int | None


def kernel(where: Computation, instruction: Instruction, *, causal: bool) -> Kernel | None:
    """What a custom call runs, or None where it is no Pallas kernel."""
    if instruction.opcode != "custom-call" or instruction.target != TARGET:
        return None
    name = _name(instruction)
    if _ATTENTION.search(name):
        return Kernel(name, True, _attention_flops(where, instruction, name, causal))
    estimate = _COST.search(instruction.attributes)
    return Kernel(name, False, int(estimate[1]) if estimate else None)


def _name(instruction: Instruction) -> str:
    name = _NUMBER.sub("", instruction.name)
    if name not in ("custom-call", "tpu_custom_call", "pallas_call", "closed_call"):
        return name
    # Called after the call itself: the kernel is the part of the path before it.
    path = _OP_NAME.search(instruction.attributes)
    parts = [part for part in path[1].split("/") if part != "pallas_call"] if path else []
    return parts[-1] if parts else name


def _attention_flops(
    where: Computation, instruction: Instruction, name: str, causal: bool
) -> int | None:
    # Masks and segment ids are integers: the first arrays of floats are queries, keys, values.
    given = [leaves(where.instructions[each].shape)[0] for each in instruction.operands]
    floats = [leaf for leaf in given if leaf.dtype in _FLOATS and len(leaf.dims) > 1]
    if len(floats) < 3:
        return None
    queries, keys, values = floats[:3]
    minor = dict(_LAYOUT.findall(instruction.attributes))
    length, width = _split(keys, minor.get("k"))
    if _split(values, minor.get("v"))[0] != length or _split(queries, minor.get("q"))[1] != width:
        return None
    product = 2 * math.prod(queries.dims) * length
    return _products(name, instruction, queries) * product // (2 if causal else 1)


def _split(array: Leaf, layout: str | None) -> tuple[int, int]:
    """Length and head dim of queries, keys or values."""
    if layout == _SEQUENCE_MINOR:
        return array.dims[-1], array.dims[-2]
    return array.dims[-2], array.dims[-1]


def _products(name: str, instruction: Instruction, queries: Leaf) -> int:
    if not re.search("dkv|bwd|backward", name):
        return 3 if "dq" in name else 2
    said = _FUSED.search(instruction.attributes)
    if said is not None:
        return 5 if said[1] == "true" else 4
    # A fused kernel also gives a dq for each block of keys, which the caller sums.
    ranks = [len(leaf.dims) for leaf in leaves(instruction.shape)]
    return 5 if max(ranks) > len(queries.dims) else 4
