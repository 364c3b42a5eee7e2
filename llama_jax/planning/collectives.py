"""Collectives of a compiled program: which mesh axis, how many bytes, and how they are scheduled.

Bytes are those of the output for all-gather and all-reduce, of the input for reduce-scatter, and
of one hop for collective-permute. The instructions of one asynchronous collective count once, at
its start.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from llama_jax.planning.program_shapes import leaves
from llama_jax.planning.program_text import Computation, Instruction, Program, ProgramError

# Between slices the compiler leaves the work to a runtime on the hosts, by sends that name it.
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="?(\w+)')

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

Form = Literal["sync", "start/done", "async-collective-fusion", "sparsecore", "sync-fused-rs"]

_LISTED = re.compile(r"replica_groups=\{((?:\{[\d, ]*\},? ?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^{}]*)\}")
_NAMED = re.compile(r"'([^']*)'=(\d+)")
_AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
_ORDER = re.compile(r"device_ids=\(?\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\s*\d+\},?\s*)*)\}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a program's devices stand: mesh axes with sizes, in order, and slice and place of each.

    Devices are numbered as the program numbers them, along the mesh with the last axis fastest.
    """

    axes: Mapping[str, int] = dataclasses.field(hash=False)
    coords: tuple[tuple[int, ...], ...] = ()
    slices: tuple[int, ...] = ()

    @classmethod
    def of(cls, mesh: Any) -> "Layout":
        """The layout of a `jax.sharding.Mesh`."""
        devices = list(mesh.devices.flat)
        return cls(
            axes=dict(zip(mesh.axis_names, mesh.devices.shape, strict=True)),
            coords=tuple(tuple(getattr(device, "coords", ())) for device in devices),
            slices=tuple(getattr(device, "slice_index", 0) for device in devices),
        )

    @property
    def num_devices(self) -> int:
        """Devices in the mesh."""
        return math.prod(self.axes.values())

    def axis(self, groups: Iterable[Sequence[int]]) -> str:
        """The axes along which a group's devices differ, joined by `+`."""
        varying: set[int] = set()
        shape = tuple(self.axes.values())
        for group in groups:
            places = np.unravel_index(np.asarray(group), shape)
            varying |= {axis for axis, place in enumerate(places) if np.ptp(place)}
        return "+".join(name for axis, name in enumerate(self.axes) if axis in varying)

    def num_slices(self, groups: Iterable[Sequence[int]]) -> int:
        """Slices that a group's devices are in, at most."""
        if not self.slices:
            return 1
        return max((len({self.slices[device] for device in group}) for group in groups), default=1)

    def slice_groups(self) -> list[list[int]]:
        """For each place in a slice, the devices there of all slices."""
        members: dict[int, list[int]] = {}
        for device, number in enumerate(self.slices):
            members.setdefault(number, []).append(device)
        return [list(group) for group in zip(*members.values(), strict=True)]

    def torus(self, groups: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
        """Axes of the chips' network along which groups differ, and places along each."""
        found: dict[int, int] = {}
        for group in groups if self.coords and self.coords[0] else ():
            places = np.asarray([self.coords[device] for device in group])
            for axis, column in enumerate(places.T):
                count = len(set(column.tolist()))
                if count > 1:
                    found[axis] = max(count, found.get(axis, 0))
        return tuple(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same devices, as they appear; figures a device and step.

    Attributes:
      axis: mesh axes it runs along, joined by `+`.
      count: how many are run.
      bytes: of all of them, by the convention of this module.
      overlapped: whether it is split in a start and an end with work between.
      form: how it appears in the schedule.
      num_slices: slices whose devices exchange; over 1, bytes go over the data-centre network.
      torus: axes of the chips' network it runs along, each with the places that a group takes
        there; () where the devices' places aren't known.
    """

    kind: str
    axis: str
    count: int
    bytes: int
    overlapped: bool
    form: Form
    num_slices: int = 1
    torus: tuple[tuple[int, int], ...] = ()

    def times(self, number: int) -> "Collective":
        """The same, that many times."""
        return dataclasses.replace(self, count=self.count * number, bytes=self.bytes * number)


def collective(
    program: Program, where: Computation, instruction: Instruction, layout: Layout
) -> Collective | None:
    """What an instruction starts, or None where it is no collective or not a start."""
    if instruction.opcode == "send":
        return _between_slices(where, instruction, layout)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    form = _form(program, where, instruction)
    if form is None:
        return None
    if form == "sync-fused-rs":
        kind = "reduce-scatter"
    groups = _groups(instruction, layout)
    return Collective(
        kind=kind,
        axis=layout.axis(groups),
        count=1,
        bytes=_bytes(where, instruction, kind),
        overlapped=form not in ("sync", "sync-fused-rs"),
        form=form,
        num_slices=layout.num_slices(groups),
        torus=layout.torus(groups),
    )


def _between_slices(
    where: Computation, instruction: Instruction, layout: Layout
) -> Collective | None:
    found = _MEGASCALE.search(instruction.attributes)
    if found is None:
        return None
    groups = layout.slice_groups()
    sent = leaves(where.instructions[instruction.operands[0]].shape)
    return Collective(
        kind=found[1].lower().replace("_", "-"),
        axis=layout.axis(groups),
        count=1,
        bytes=sum(leaf.nbytes for leaf in sent),
        overlapped=True,
        form="start/done",
        # A layout without slices can't tell how many; there are at least two.
        num_slices=max(2, layout.num_slices(groups)),
    )


def merge(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """Add up what differs only in count and bytes; most bytes first."""
    sums: dict[Collective, tuple[int, int]] = {}
    for each in collectives:
        key = dataclasses.replace(each, count=0, bytes=0)
        count, size = sums.get(key, (0, 0))
        sums[key] = count + each.count, size + each.bytes
    merged = [dataclasses.replace(k, count=count, bytes=size) for k, (count, size) in sums.items()]
    return tuple(sorted(merged, key=lambda each: -each.bytes))


def _form(program: Program, where: Computation, instruction: Instruction) -> Form | None:
    """How it is scheduled; None where this instruction is a later part of another's work."""
    if where.thread == "sparsecore":
        return "sparsecore"
    calls = {caller.opcode for _, caller in program.callers.get(where.name, [])}
    if instruction.opcode.endswith("-start") or "async-start" in calls:
        return "start/done"
    if "fusion" not in calls:
        return "sync"
    targets = {each.target for each in where.instructions.values()}
    if "AsyncCollectiveStart" in targets:
        return "async-collective-fusion"
    if instruction.opcode == "all-reduce" and _sliced(where, instruction):
        return "sync-fused-rs"
    return None if handed_on(where, instruction) else "sync"


def _sliced(where: Computation, instruction: Instruction) -> bool:
    """Whether all that is used of an all-reduce is a slice: a reduce-scatter by another name."""
    users = where.users()
    seen = users.get(instruction.name, [])
    while seen and all(user.opcode in ("bitcast", "reshape", "copy", "tuple") for user in seen):
        seen = [after for user in seen for after in users.get(user.name, [])]
    return bool(seen) and all(user.opcode in ("dynamic-slice", "slice") for user in seen)


def handed_on(where: Computation, instruction: Instruction) -> bool:
    """Whether a fusion only carries a collective that was started before it."""
    users = where.users().get(instruction.name, [])
    return bool(users) and all(
        user.opcode == "tuple" or user.target == "AsyncCollectiveDone" for user in users
    )


def _bytes(where: Computation, instruction: Instruction, kind: str) -> int:
    operands = [where.instructions[name] for name in instruction.operands]
    # What the compiler pads a fused reduce-scatter with isn't of the input.
    padded = [where.instructions[each.operands[0]] for each in operands if each.opcode == "pad"]
    given = [leaf for each in padded or operands for leaf in leaves(each.shape)]
    if kind == "reduce-scatter":
        return sum(leaf.nbytes for leaf in given)
    made = leaves(instruction.shape)
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        # (operands, results, semaphores)
        made = made[len(given) : 2 * len(given)]
    return sum(leaf.nbytes for leaf in made)


def _groups(instruction: Instruction, layout: Layout) -> list[list[int]]:
    """The groups of devices that exchange, each a list of device numbers."""
    text = instruction.attributes
    if "collective-permute" in instruction.opcode:
        pairs = _PAIRS.search(text)
        return [_integers(pair) for pair in re.findall(r"\{([^{}]+)\}", pairs[1])] if pairs else []
    groups = _read_groups(text[: _after_groups(text)])
    if groups is None:
        raise ProgramError(f"{instruction.name}: its replica_groups can't be read")
    return groups or [list(range(layout.num_devices))]


def _after_groups(text: str) -> int:
    start = text.find("replica_groups=")
    return len(text) if start < 0 else start + 100_000


@functools.lru_cache(maxsize=256)
def _read_groups(text: str) -> list[list[int]] | None:
    if iota := _IOTA.search(text):
        shape, sizes, order = (_integers(part or "") for part in iota.groups())
        return _iota(sizes, order).reshape(shape).tolist()
    if mesh := _MESH.search(text):
        return _mesh_groups(*mesh.groups())
    if listed := _LISTED.search(text):
        return [_integers(group) for group in re.findall(r"\{([\d, ]*)\}", listed[1])]
    return None


def _mesh_groups(axes: str, order: str, chosen: str) -> list[list[int]]:
    """`mesh['x'=2,'y'=4] {'y'}`: groups along some axes, or along parts of them: `'y':(1)2`."""
    sizes = {name: int(size) for name, size in _NAMED.findall(axes)}
    found = _ORDER.search(order)
    devices = np.arange(math.prod(sizes.values()))
    if found is not None:
        shape, base, transposed = (_integers(part or "") for part in found.groups())
        devices = _iota(base or shape, transposed).reshape(-1)
    dims: list[tuple[int, bool]] = []
    parts = {name: (before, size) for name, before, size in _AXIS.findall(chosen)}
    for name, size in sizes.items():
        dims += _split(size, *parts[name]) if name in parts else [(size, False)]
    array = devices.reshape([size for size, _ in dims])
    along = [axis for axis, (_, inside) in enumerate(dims) if inside]
    across = [axis for axis, (_, inside) in enumerate(dims) if not inside]
    width = math.prod(dims[axis][0] for axis in along)
    return array.transpose(*across, *along).reshape(-1, width).tolist()


def _split(size: int, before: str, inside: str) -> list[tuple[int, bool]]:
    if not inside:
        return [(size, True)]
    outer, inner = int(before), int(inside)
    return [(outer, False), (inner, True), (size // (outer * inner), False)]


def _iota(sizes: list[int], order: list[int]) -> np.ndarray:
    array = np.arange(math.prod(sizes)).reshape(sizes)
    return array.transpose(order) if order else array


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
