"""Optimised HLO text as computations and instructions: reading only, no meaning.

Texts have tens of thousands of long lines, so that a line is split once and its attributes are
searched for only when asked.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"[ ,{](calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_LISTED = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_INDEX = re.compile(r"[, ]index=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_UNKNOWN_CYCLES = 2**63 - 1


class ProgramError(ValueError):
    """A compiled program's text that can't be read; one line that names the instruction."""


@dataclasses.dataclass(slots=True)
class Instruction:
    """One instruction: `name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def index(self) -> int:
        """`index` of a get-tuple-element, the number of a parameter."""
        if self.opcode == "parameter":
            return int(self.arguments)
        found = _INDEX.search(self.attributes)
        if found is None:
            raise ProgramError(f"{self.name}: {self.opcode} without an index")
        return int(found[1])

    @property
    def called(self) -> dict[str, str]:
        """Computations it names, by the attribute that names them; branches are not among them."""
        return dict(_CALLED.findall(" " + self.attributes))

    @property
    def listed(self) -> list[str]:
        """The computations a conditional chooses from, or a custom call runs."""
        found = _LISTED.search(self.attributes)
        if found is not None:
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        called = self.called
        keys = ("true_computation", "false_computation")
        return [called[key] for key in keys if key in called]

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate; None where it has none or says the largest integer."""
        found = _CYCLES.search(self.attributes)
        cycles = int(found[1]) if found else _UNKNOWN_CYCLES
        return None if cycles >= _UNKNOWN_CYCLES else cycles

    @property
    def target(self) -> str:
        """What a custom call calls; "" for other instructions."""
        return self.attribute("custom_call_target").strip('"')

    def attribute(self, name: str) -> str:
        """The text of `name=...` up to the next comma, or to the brace that closes it; or ""."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if found is None:
            return ""
        rest = self.attributes[found.end() : found.end() + 100_000]
        if rest.startswith("{"):
            return rest[: _closing(rest, 0, "{", "}") + 1]
        return re.match(r'"[^"]*"|[^,]*', rest)[0]  # pyright: ignore[reportOptionalSubscript]


@dataclasses.dataclass(slots=True)
class Computation:
    """A named list of instructions, in the order of the schedule.

    `thread` is "sparsecore" for what runs on the SparseCore, "" for the rest.
    """

    name: str
    instructions: dict[str, Instruction]
    root: str
    thread: str = ""

    @property
    def parameters(self) -> list[Instruction]:
        """Its parameters by number."""
        found = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return sorted(found, key=lambda each: each.index)

    def users(self) -> dict[str, list[Instruction]]:
        """For each instruction, those that have it as an operand."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass
class Program:
    """All computations of a module by name, and which one is the entry."""

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def callers(self) -> dict[str, list[tuple[Computation, Instruction]]]:
        """For each computation, the instructions that name it and where they are."""
        callers: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for name in {*instruction.called.values(), *instruction.listed}:
                    callers.setdefault(name, []).append((computation, instruction))
        return callers


def parse(text: str) -> Program:
    """Split a module's text.

    Raises:
      ProgramError: no entry computation, or a line that is no instruction.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    for header, lines, thread in _blocks(text):
        name = header[2]
        instructions: dict[str, Instruction] = {}
        root = ""
        for line in lines:
            instruction, is_root = _instruction(line, name)
            instructions[instruction.name] = instruction
            root = instruction.name if is_root or not root else root
        computations[name] = Computation(name, instructions, root, thread)
        entry = name if header[1] else entry
    if not entry:
        raise ProgramError("no ENTRY computation: not the text of a compiled program")
    return Program(computations, entry)


def _blocks(text: str) -> Iterator[tuple[re.Match[str], list[str], str]]:
    """Each computation's header, instructions (those of several lines joined) and thread."""
    header: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        if header is None:
            # An instruction's continuation can't look like a header: it never stands outside.
            header, lines = (_HEADER.match(line) if "->" in line else None), []
        elif line == "}" or line.startswith("}, execution_thread"):
            yield header, lines, line.partition("=")[2].strip('"')
            header = None
        elif _START.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line  # a kernel's metadata holds line breaks


def _instruction(line: str, computation: str) -> tuple[Instruction, bool]:
    start = _START.match(line)
    opcode = _OPCODE.search(line, start.end() - 1) if start else None
    if start is None or opcode is None:
        raise ProgramError(f"in {computation}: not an instruction: {line.strip()[:80]}")
    end = line.find(")", opcode.end())
    if "(" in line[opcode.end() : end]:
        end = _closing(line, opcode.end() - 1, "(", ")")
    shape = line[start.end() : opcode.start()]
    arguments, attributes = line[opcode.end() : end], line[end + 1 :]
    operands = tuple(_NAME.findall(arguments))
    instruction = Instruction(start[2], shape, opcode[1], operands, arguments, attributes)
    return instruction, bool(start[1])


def _closing(text: str, start: int, opening: str, closing: str) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == opening) - (text[position] == closing)
        if depth == 0:
            return position
    return len(text)
