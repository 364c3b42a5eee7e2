"""Bytes that one instruction moves: in HBM, and apart from that between HBM and the host.

Only buffers without a memory-space tag are in HBM. A slice counts at its own size, an update in
place at the update's, what is handed through unchanged not at all, an asynchronous copy once, at
its start. Reads that a kernel repeats aren't seen.
"""

import dataclasses
import functools
from typing import NamedTuple

from llama_jax.planning.collectives import KINDS, handed_on
from llama_jax.planning.program_shapes import HBM, HOST, Leaf, leaves
from llama_jax.planning.program_text import Computation, Instruction, Program

_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "while"),
    *("conditional", "call", "partition-id", "replica-id", "opt-barrier", "optimization-barrier"),
    *("add-dependency", "domain", "get-dimension-size", "rng-get-and-update-state"),
}
# Custom calls that tell the compiler something and move nothing.
_FREE_TARGETS = {
    *("AssumeGatherIndicesInBound", "ConcatBitcast", "AllocateBuffer", "Sharding", "SliceBitcast"),
    *(
        "AsyncCollectiveStart",
        "AsyncCollectiveDone",
        "LayoutConstraint",
        "xla.sdy.FuncResultSharding",
    ),
}
_SLICES = ("dynamic-slice", "slice", "gather")
# How far the result of an operation of one operand is from it. A loop fusion computes only the
# elements that are asked of it, so that a slice of any of these is a slice of the operand.
_IDENTICAL, _REARRANGED, _CONVERTED = 0, 1, 2
_DISTANCE = {
    "bitcast": _IDENTICAL,
    **dict.fromkeys(("copy", "reshape"), _REARRANGED),
    **dict.fromkeys(("convert", "transpose", "negate", "bitcast-convert"), _CONVERTED),
}


class Traffic(NamedTuple):
    """Bytes in HBM (read and written), and bytes to or from host memory."""

    hbm: int
    host: int


@dataclasses.dataclass(frozen=True)
class _Use:
    """What a fused computation does with its buffers.

    Attributes:
      reads: elements that it reads of each parameter; None for all.
      writes: elements that it writes of each leaf of its result; None for all.
    """

    reads: tuple[int | None, ...]
    writes: tuple[int | None, ...]


class Counter:
    """Counts the traffic of a program's instructions."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._use = functools.lru_cache(maxsize=None)(self._use_of)

    def traffic(self, where: Computation, instruction: Instruction) -> Traffic:
        """Bytes of one run of the instruction; those of computations it calls aren't in it."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done") or opcode == "async-update":
            return Traffic(0, 0)
        if opcode == "custom-call" and instruction.target in _FREE_TARGETS:
            return Traffic(0, 0)
        if opcode == "fusion":
            return self._fusion(where, instruction)
        if opcode.endswith("-start"):
            return _started(where, instruction)
        return _plain(where, instruction)

    def _fusion(self, where: Computation, instruction: Instruction) -> Traffic:
        use = self._use(instruction.called["calls"])
        moved: list[tuple[Leaf, int | None]] = []
        for name, elements in zip(instruction.operands, use.reads, strict=True):
            moved += [(leaf, elements) for leaf in leaves(where.instructions[name].shape)]
        moved += zip(leaves(instruction.shape), use.writes, strict=True)
        return _sum(moved)

    def _use_of(self, name: str) -> _Use:
        where = self._program.computations[name]
        users = where.users()
        root = where.instructions[where.root]
        reads = tuple(self._reads(where, users, each) for each in where.parameters)
        if root.target == "AsyncCollectiveStart":
            # (operand, gathered, semaphores): the operand is handed on, the rest is written.
            written = [leaf.elements for leaf in leaves(root.shape)]
            return _Use((None,) * len(reads), (0, *written[1:]))
        return _Use(reads, self._root_writes(where, root))

    def _root_writes(self, where: Computation, root: Instruction) -> tuple[int | None, ...]:
        if root.opcode != "tuple":
            return (self._writes(where, root),) * len(leaves(root.shape))
        return tuple(self._writes(where, where.instructions[name]) for name in root.operands)

    def _reads(
        self,
        where: Computation,
        users: dict[str, list[Instruction]],
        value: Instruction,
        distance: int = _IDENTICAL,
    ) -> int | None:
        """Elements read of a value of a fused computation, at most all of it (None).

        `distance` is how far the value is from the buffer that is asked about.
        """
        if value.name == where.root and distance > _IDENTICAL:
            return None
        total = 0
        for user in users.get(value.name, ()):
            elements = self._read_by(where, users, value, user, distance)
            if elements is None:
                return None
            total += elements
        whole = sum(leaf.elements for leaf in leaves(value.shape))
        return None if total >= whole and total else total

    def _read_by(
        self,
        where: Computation,
        users: dict[str, list[Instruction]],
        value: Instruction,
        user: Instruction,
        distance: int,
    ) -> int | None:
        opcode = user.opcode
        first = bool(user.operands) and user.operands[0] == value.name
        if opcode in _SLICES and first:
            return leaves(user.shape)[0].elements
        if opcode == "dynamic-update-slice" and first:
            return 0 if distance <= _REARRANGED else None
        if opcode == "tuple" or user.target in _FREE_TARGETS:
            return 0 if distance == _IDENTICAL else None
        if opcode in KINDS and handed_on(where, user):
            return 0  # an asynchronous collective counts where it starts
        further = self._distance(user)
        if further is not None:
            return self._reads(where, users, user, max(distance, further))
        return self._read_inside(value, user) if opcode == "fusion" else None

    def _read_inside(self, value: Instruction, user: Instruction) -> int | None:
        total = 0
        use = self._use(user.called["calls"])
        for name, elements in zip(user.operands, use.reads, strict=True):
            if name == value.name and elements is None:
                return None
            total += elements or 0 if name == value.name else 0
        return total

    def _distance(self, instruction: Instruction) -> int | None:
        """How far a result is from its one operand; None where it is something else."""
        if instruction.opcode != "fusion" or len(instruction.operands) != 1:
            return _DISTANCE.get(instruction.opcode)
        where = self._program.computations[instruction.called["calls"]]
        value, distance = where.instructions[where.root], _IDENTICAL
        while value.opcode != "parameter":
            further = self._distance(value)
            if further is None:
                return None
            value, distance = where.instructions[value.operands[0]], max(distance, further)
        return distance

    def _writes(self, where: Computation, value: Instruction) -> int | None:
        """Elements that a result of a fused computation writes."""
        value, distance = self._source(where, value)
        through = value.opcode == "parameter" or value.target in _FREE_TARGETS
        through = through or (value.opcode in KINDS and handed_on(where, value))
        if through:
            return 0 if distance == _IDENTICAL else None
        if value.opcode == "dynamic-update-slice" and self._in_place(where, value):
            return leaves(where.instructions[value.operands[1]].shape)[0].elements
        if value.opcode == "fusion" and distance == _IDENTICAL:
            return self._use(value.called["calls"]).writes[0]
        return None

    def _source(self, where: Computation, value: Instruction) -> tuple[Instruction, int]:
        """Where a value comes from, through what only rearranges it."""
        distance = _IDENTICAL
        further = self._distance(value)
        while further is not None and further <= _REARRANGED:
            value, distance = where.instructions[value.operands[0]], max(distance, further)
            further = self._distance(value)
        return value, distance

    def _in_place(self, where: Computation, update: Instruction) -> bool:
        """Whether an update's target is a buffer that the computation is given."""
        target, _ = self._source(where, where.instructions[update.operands[0]])
        while target.opcode == "dynamic-update-slice":
            target, _ = self._source(where, where.instructions[target.operands[0]])
        return target.opcode == "parameter"


def _started(where: Computation, instruction: Instruction) -> Traffic:
    """The two ends of an asynchronous copy, slice or collective."""
    if instruction.opcode == "async-start":
        return Traffic(0, 0)  # what it calls is counted
    made = leaves(instruction.shape)
    if instruction.opcode == "copy-start":
        return _sum([(made[0], None), (made[1], None)])
    sources = [
        leaf for name in instruction.operands for leaf in leaves(where.instructions[name].shape)
    ]
    if instruction.opcode in ("slice-start", "dynamic-slice-start"):
        target = made[len(sources)]
        return _sum([(sources[0], target.elements), (target, None)])
    if instruction.opcode == "dynamic-update-slice-start":
        # How a layer's offloaded tensors reach the host's stack of all layers'.
        stack, update = sources[:2]
        return _sum([(update, None), (stack, update.elements)])
    targets = made[len(sources) : 2 * len(sources)] or made[:1]
    return _sum([(leaf, None) for leaf in (*sources, *targets)])


def _plain(where: Computation, instruction: Instruction) -> Traffic:
    made: list[tuple[Leaf, int | None]] = [(leaf, None) for leaf in leaves(instruction.shape)]
    given = [leaves(where.instructions[name].shape) for name in instruction.operands]
    opcode = instruction.opcode
    if opcode in ("send", "recv"):
        # (the buffer, an identifier, a token): read to be sent, written when received.
        return _sum(made[:1])
    if opcode in _SLICES:
        read: list[tuple[Leaf, int | None]] = [(given[0][0], made[0][0].elements)]
        read += [(leaf, None) for part in given[1:] for leaf in part]
        return _sum([*read, *made])
    if opcode == "dynamic-update-slice":
        update = given[1][0]
        return _sum([(update, None), (made[0][0], update.elements)])
    if opcode == "scatter":
        update = given[-1][0]
        return _sum([(update, None), (made[0][0], 2 * update.elements)])
    return _sum([*made, *((leaf, None) for part in given for leaf in part)])


def _sum(moved: list[tuple[Leaf, int | None]]) -> Traffic:
    hbm = host = 0
    for leaf, elements in moved:
        size = leaf.nbytes if elements is None else (elements * leaf.bits + 7) // 8
        if leaf.space == HBM:
            hbm += size
        elif leaf.space == HOST:
            host += size
    return Traffic(hbm, host)
