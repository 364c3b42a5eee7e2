"""What takes a compiled step's HBM at the moment it takes most: buffers by what they are for.

Reads three texts that XLA dumps, also of a program that doesn't fit: the optimised HLO, the buffer
assignment (each value's place and size) and the live ranges (from when to when it is held).
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from llama_jax.planning.memory_report_categories import Category, Namer
from llama_jax.planning.program_shapes import HBM
from llama_jax.planning.program_text import ProgramError, parse

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+), (?:color (\d+), )?(.*):$")
_VALUE = re.compile(
    r"^ value: <\d+ (\S+?)(\{[\d,]*\})?(?: \(phi\))? @(\d+)> \(size=(\d+),offset=(\d+)\): (.*)$"
)
_RANGE = re.compile(r"^    (\S+?)(\{[\d,]*\}):(\d+)-(\d+)$")
_FILES = {
    "program": "after_optimizations.txt",
    "assignment": "after_optimizations-buffer-assignment.txt",
    "ranges": "after_optimizations-live-range.txt",
}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A piece of HBM that is held at the peak, padding included; `shape` is one of its values'."""

    name: str
    shape: str
    bytes: int
    category: Category


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """A JAX device's HBM at the peak of a step; bytes.

    Attributes:
      argument_bytes: what the step is given: state and batch.
      temp_bytes: the room that the compiler takes for everything else.
      by_category: what is held at the peak; `unused` is room for temporaries that isn't.
      buffers: the pieces, largest first.
      peak_at: the instruction during which most is held.
    """

    argument_bytes: int
    temp_bytes: int
    by_category: dict[Category, int]
    buffers: tuple[Buffer, ...]
    peak_at: str


@dataclasses.dataclass(frozen=True)
class _Value:
    """One value in the assignment: where it lies, and from when to when."""

    name: str
    path: tuple[int, ...]
    shape: str
    allocation: int
    offset: int
    size: int
    start: int = 0
    end: int = 0


@dataclasses.dataclass
class _Assignment:
    arguments: dict[int, int]  # allocations by number, with sizes
    temporary: dict[int, int]
    values: list[_Value]


def read_memory_report(folder: Path) -> MemoryReport:
    """The report of the largest program whose dump lies in a folder.

    Raises:
      ProgramError: no dump is there, or it can't be read.
    """
    programs = sorted(folder.glob(f"*.{_FILES['program']}"), key=lambda file: file.stat().st_size)
    if not programs:
        raise ProgramError(f"no dump of a compiled program in {folder}")
    stem = programs[-1].name.removesuffix(_FILES["program"])
    texts = {
        key: (folder / (stem + ending)).read_text(encoding="utf-8", errors="replace")
        for key, ending in _FILES.items()
    }
    return memory_report(**texts)


def memory_report(program: str, assignment: str, ranges: str) -> MemoryReport:
    """Read the three texts of one program.

    Raises:
      ProgramError: a text isn't what it should be.
    """
    namer = Namer(parse(program))
    placed = _assignment(assignment)
    order, live = _live_ranges(ranges)
    values = [
        dataclasses.replace(value, start=span[0], end=span[1])
        for value in placed.values
        if (span := live.get((value.name, value.path))) is not None
    ]
    temporary = [value for value in values if value.allocation in placed.temporary]
    moment = _peak(temporary)
    held = [value for value in temporary if value.start <= moment <= value.end]
    given = [value for value in placed.values if value.allocation in placed.arguments]
    buffers = [*_pieces(given, namer), *_pieces(held, namer)]
    temp_bytes = sum(placed.temporary.values())
    return MemoryReport(
        argument_bytes=sum(placed.arguments.values()),
        temp_bytes=temp_bytes,
        by_category=_by_category(buffers, placed),
        buffers=tuple(sorted(buffers, key=lambda buffer: -buffer.bytes)),
        peak_at=order[moment] if moment < len(order) else "",
    )


def _assignment(text: str) -> _Assignment:
    found = _Assignment({}, {}, [])
    number = -1
    kept = False
    for line in text.splitlines():
        if allocation := _ALLOCATION.match(line):
            number, size, kind = int(allocation[1]), int(allocation[2]), allocation[4]
            # Calls' own scratch, and memories other than HBM, are left out.
            kept = int(allocation[3] or HBM) == HBM and "thread-local" not in kind
            if kept:
                group = found.arguments if "parameter " in kind else found.temporary
                group[number] = size
        elif kept and (value := _VALUE.match(line)):
            size, offset = int(value[4]), int(value[5])
            found.values.append(_Value(value[1], _path(value[2]), value[6], number, offset, size))
    if not found.values:
        raise ProgramError("the buffer assignment holds no values")
    return found


def _live_ranges(text: str) -> tuple[list[str], dict[tuple[str, tuple[int, ...]], tuple[int, int]]]:
    """The instructions in the order they run, and first and last moment of each value."""
    order: list[str] = []
    live: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for line in text.splitlines():
        if span := _RANGE.match(line):
            live[span[1], _path(span[2])] = int(span[3]), int(span[4])
        elif step := re.match(r"^    (\d+):(\S+)$", line):
            order.append(step[2])
    if not live:
        raise ProgramError("the live ranges hold no values")
    return order, live


def _path(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text or ""))


def _peak(values: Iterable[_Value]) -> int:
    """The moment at which most is held, what shares a place counted once."""
    places: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for value in values:
        place = (value.allocation, value.offset, value.size)
        places.setdefault(place, []).append((value.start, value.end))
    changes: dict[int, int] = {}
    for (_, _, size), spans in places.items():
        for start, end in _joined(spans):
            changes[start] = changes.get(start, 0) + size
            changes[end + 1] = changes.get(end + 1, 0) - size
    most, moment, held = -1, 0, 0
    for when in sorted(changes):
        held += changes[when]
        if held > most:
            most, moment = held, when
    return moment


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _pieces(values: Iterable[_Value], namer: Namer) -> list[Buffer]:
    """One buffer for all values in one place, named by the one that says most."""
    places: dict[tuple[int, int], list[_Value]] = {}
    for value in values:
        places.setdefault((value.allocation, value.offset), []).append(value)
    return [_piece(sharing, namer) for sharing in places.values()]


def _piece(sharing: list[_Value], namer: Namer) -> Buffer:
    size = max(value.size for value in sharing)
    largest = [value for value in sharing if value.size == size]
    named: list[tuple[Category, _Value]] = [
        (namer.category(value.name, value.shape), value) for value in largest
    ]
    category, value = next((each for each in named if each[0] != "temporaries"), named[0])
    return Buffer(namer.title(value.name), value.shape, size, category)


def _by_category(buffers: list[Buffer], placed: _Assignment) -> dict[Category, int]:
    sums: dict[Category, int] = {}
    for buffer in buffers:
        sums[buffer.category] = sums.get(buffer.category, 0) + buffer.bytes
    room = sum(placed.arguments.values()) + sum(placed.temporary.values())
    sums["unused"] = room - sum(sums.values())
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
