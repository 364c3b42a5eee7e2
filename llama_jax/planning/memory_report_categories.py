"""What a buffer of a training step is for, told by its name in the program and its shape.

The step's arguments carry their path in the state (`args[0].params['layers'][...]`), the rest the
path of the operation that made it. Names are the compiler's: a buffer that tells nothing of itself
is one of the temporaries.
"""

import math
import re
from typing import Literal

from llama_jax.planning.program_shapes import Leaf, leaves
from llama_jax.planning.program_text import Instruction, Program

Category = Literal[
    "parameters",
    "optimizer_state",
    "batch",
    "gradients",
    "saved_activations",
    "gathered_weights",
    "loss",
    "temporaries",
    "unused",
]

# The compiler's own moves and conversions have no path: what they are of has.
_COPIES = ("copy", "copy-start", "copy-done", "get-tuple-element", "bitcast", "convert")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Namer:
    """Names of a program's values: what they are for, and where they come from."""

    def __init__(self, program: Program) -> None:
        self._made = {
            name: instruction
            for computation in program.computations.values()
            for name, instruction in computation.instructions.items()
        }
        self._gathers = _gathering(program)
        entry = program.computations[program.entry]
        arguments = [(_op_name(each), leaves(each.shape)) for each in entry.parameters]
        weights = [(name, found[0]) for name, found in arguments if ".params[" in name and found]
        self._weights = {_key(leaf.dims) for _, leaf in weights if len(leaf.dims) > 1}
        layered = [leaf.dims[0] for name, leaf in weights if "['layers']" in name and leaf.dims]
        self._layers = layered[0] if layered else 0
        self._gathered = _gathered_sizes(program)
        # Tokens by vocabulary is larger than any weight; the vocabulary is the embedding's length.
        embedding = [leaf.dims[0] for name, leaf in weights if "['embedding']" in name]
        self._vocabulary = set(embedding)

    def title(self, name: str) -> str:
        """The path of the operation or argument that makes a value, or the value's own name."""
        made = self._made.get(name)
        while made is not None:
            if path := _op_name(made):
                return path
            made = self._made.get(made.operands[0]) if made.opcode in _COPIES else None
        return name

    def category(self, name: str, shape: str) -> Category:
        """What a value of this name and shape is for."""
        path = self.title(name)
        found = leaves(shape)
        if path.startswith("args[") and self._made[name].opcode == "parameter":
            return _argument(path)
        if shape.startswith("(") or not found or len(found[0].dims) < 2:
            return "temporaries"
        leaf = found[0]
        if name in self._gathers or self._is_copy_of_weights(leaf):
            return "gathered_weights"
        if self._is_gradient(leaf, path):
            return "gradients"
        if self._vocabulary & set(leaf.dims):
            return "loss"
        if self._layers > 1 and leaf.dims[0] == self._layers:
            return "saved_activations"
        return "temporaries"

    def _is_copy_of_weights(self, leaf: Leaf) -> bool:
        """All layers' shards in the compute dtype, converted once before the loop."""
        return leaf.dtype != "f32" and _key(leaf.dims) in self._weights

    def _is_gradient(self, leaf: Leaf, path: str) -> bool:
        """As a parameter's shard, or as a whole parameter where the path is of a backward pass."""
        if leaf.dtype == "f32" and _key(leaf.dims) in self._weights:
            return True
        return "transpose(" in path and _key(leaf.dims) in self._gathered


def _argument(path: str) -> Category:
    if ".params[" in path:
        return "parameters"
    return "optimizer_state" if path.startswith("args[0]") else "batch"


def _op_name(instruction: Instruction) -> str:
    found = _OP_NAME.search(instruction.attributes)
    return found[1].replace("\\", "") if found else ""


def _key(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Dimensions without those of 1, in any order: layouts move them."""
    return tuple(sorted(size for size in dims if size != 1))


def _gathering(program: Program) -> set[str]:
    """Instructions that gather, and fusions in which a gather starts or ends."""
    inner = {
        computation.name
        for computation in program.computations.values()
        if any(each.opcode == "all-gather" for each in computation.instructions.values())
    }
    return {
        name
        for computation in program.computations.values()
        for name, each in computation.instructions.items()
        if each.opcode.startswith("all-gather")
        or (each.opcode.startswith(("fusion", "async")) and inner & set(each.called.values()))
        or (each.opcode.startswith("async") and "all-gather" in name)
    }


def _gathered_sizes(program: Program) -> set[tuple[int, ...]]:
    return {
        _key(leaf.dims)
        for computation in program.computations.values()
        for each in computation.instructions.values()
        if each.opcode.startswith("all-gather")
        for leaf in leaves(each.shape)[-1:]
        if math.prod(leaf.dims) > 1
    }
