"""How often a loop runs: its counter followed through initial tuple, body and condition.

TPU text says no trip count, and loops may start anywhere, step by more than one, count down, or
carry their bound. So the few scalars that the condition needs are computed, iteration by
iteration. What can't be known is an error that names the loop, never a guess.
"""

import functools
import operator
import re
from collections.abc import Callable
from typing import Any

from llama_jax.planning.program_text import Computation, Instruction, Program, ProgramError

MAX_TRIPS = 1_000_000

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME = ("copy", "bitcast", "reshape", "convert", "broadcast", "copy-start", "copy-done")
_COMPARE = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}

# Maps (parameter number, path into a nested tuple) to a scalar.
Arguments = Callable[[int, tuple[int, ...]], Any]


class LoopError(ProgramError):
    """A loop whose trip count can't be read from the text."""


class _UnknownError(Exception):
    """A value that the text doesn't determine."""


def trip_count(program: Program, where: Computation, loop: Instruction) -> int:
    """Times the body of `loop`, a `while` in the computation `where`, runs.

    Raises:
      LoopError: the count depends on what isn't in the text, or is over `MAX_TRIPS`.
    """
    known = _KNOWN.search(loop.attributes)
    if known is not None:
        return int(known[1])
    try:
        return _simulate(program, where, loop)
    except _UnknownError as unknown:
        raise LoopError(
            f"loop {loop.name} in {where.name}: its trip count isn't in the program ({unknown})"
        ) from None


def _simulate(program: Program, where: Computation, loop: Instruction) -> int:
    condition = program.computations[loop.called["condition"]]
    body = program.computations[loop.called["body"]]
    start = _in_place(program, where)
    state = {
        path: start.value(loop.operands[0], path) for path in _needed(program, condition, body)
    }
    for trips in range(MAX_TRIPS + 1):
        scope = _Scope(program, condition, lambda _, path, now=state: _look_up(now, path))
        if not scope.value(condition.root, ()):
            return trips
        scope = _Scope(program, body, lambda _, path, now=state: _look_up(now, path))
        state = {path: scope.value(body.root, path) for path in state}
    raise _UnknownError(f"more than {MAX_TRIPS} trips")


def _look_up(state: dict[tuple[int, ...], Any], path: tuple[int, ...]) -> Any:
    if path not in state:
        raise _UnknownError(f"element {path} of its state")
    return state[path]


def _needed(program: Program, condition: Computation, body: Computation) -> set[tuple[int, ...]]:
    """The elements of the loop's state that its condition depends on, also through the body."""
    needed: set[tuple[int, ...]] = set()
    fresh = _read(program, condition, [(condition.root, ())])
    while fresh:
        needed |= fresh
        fresh = _read(program, body, [(body.root, path) for path in fresh]) - needed
    return needed


def _read(
    program: Program, where: Computation, values: list[tuple[str, tuple[int, ...]]]
) -> set[tuple[int, ...]]:
    """Paths into the parameter that some values depend on."""
    found: set[tuple[int, ...]] = set()
    seen: set[tuple[str, tuple[int, ...]]] = set()
    while values:
        name, path = values.pop()
        if (name, path) in seen:
            continue
        seen.add((name, path))
        instruction = where.instructions[name]
        if instruction.opcode == "parameter":
            found.add(path)
        elif instruction.opcode == "get-tuple-element":
            values.append((instruction.operands[0], (instruction.index, *path)))
        elif instruction.opcode == "tuple" and path:
            values.append((instruction.operands[path[0]], path[1:]))
        else:
            values.extend((operand, ()) for operand in instruction.operands)
    return found


def _in_place(program: Program, where: Computation) -> "_Scope":
    """Values in a computation, its parameters followed to the one place that calls it."""
    callers = program.callers.get(where.name, [])
    if len(callers) != 1:
        return _Scope(program, where, _nothing_known)
    outer, caller = callers[0]
    if caller.opcode == "while":
        return _Scope(program, where, functools.partial(_invariant, program, outer, caller))
    if caller.opcode in ("call", "fusion", "async-start"):
        around = _in_place(program, outer)
        return _Scope(
            program, where, lambda number, path: around.value(caller.operands[number], path)
        )
    return _Scope(program, where, _nothing_known)


def _nothing_known(number: int, path: tuple[int, ...]) -> Any:
    raise _UnknownError(f"parameter {number} of its computation")


def _invariant(
    program: Program, outer: Computation, loop: Instruction, number: int, path: tuple[int, ...]
) -> Any:
    """An element of an enclosing loop's state that its body hands on as it is."""
    body = program.computations[loop.called["body"]]
    kept = _resolved(body, body.root, path)
    if kept != (body.parameters[0].name, path):
        raise _UnknownError(f"it changes with the enclosing loop {loop.name}")
    return _in_place(program, outer).value(loop.operands[0], path)


def _resolved(where: Computation, name: str, path: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Follow tuples, get-tuple-elements and copies to where a value is made."""
    while True:
        instruction = where.instructions[name]
        if instruction.opcode == "get-tuple-element":
            name, path = instruction.operands[0], (instruction.index, *path)
        elif instruction.opcode == "tuple" and path:
            name, path = instruction.operands[path[0]], path[1:]
        elif instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            name = instruction.operands[0]
        else:
            return name, path


class _Scope:
    """Scalars of one computation, computed when asked for."""

    def __init__(self, program: Program, where: Computation, arguments: Arguments) -> None:
        self._program, self._where, self._arguments = program, where, arguments
        self._known: dict[tuple[str, tuple[int, ...]], Any] = {}

    def value(self, name: str, path: tuple[int, ...]) -> Any:
        """The scalar at `path` of an instruction's result; raises `_UnknownError`."""
        name, path = _resolved(self._where, name, path)
        if (name, path) not in self._known:
            self._known[name, path] = self._compute(self._where.instructions[name], path)
        return self._known[name, path]

    def _compute(self, instruction: Instruction, path: tuple[int, ...]) -> Any:
        opcode = instruction.opcode
        if opcode == "parameter":
            return self._arguments(instruction.index, path)
        if opcode in ("fusion", "call"):
            called = next(iter(instruction.called.values()))
            inner = self._program.computations[called]
            scope = _Scope(
                self._program,
                inner,
                lambda number, at: self.value(instruction.operands[number], at),
            )
            return scope.value(inner.root, path)
        if opcode == "constant":
            return _literal(instruction)
        return self._apply(instruction)

    def _apply(self, instruction: Instruction) -> Any:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in _SAME:
            return self.value(operands[0], ())
        if opcode in _BINARY:
            return _BINARY[opcode](self.value(operands[0], ()), self.value(operands[1], ()))
        if opcode == "compare":
            direction = instruction.attribute("direction")
            return _COMPARE[direction](self.value(operands[0], ()), self.value(operands[1], ()))
        if opcode == "not":
            return not self.value(operands[0], ())
        if opcode == "negate":
            return -self.value(operands[0], ())
        if opcode == "select":
            chosen = operands[1] if self.value(operands[0], ()) else operands[2]
            return self.value(chosen, ())
        raise _UnknownError(f"it depends on {opcode} {instruction.name}")


def _literal(instruction: Instruction) -> Any:
    text = instruction.arguments.strip(" {}")
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    raise _UnknownError(f"it depends on the constant {instruction.name}")
