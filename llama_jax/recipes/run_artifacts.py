"""A run's file among rounds: its `@name` strings are artifacts, its sources may still be empty."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from llama_jax.config.data import STRENGTHS, SourceConfig
from llama_jax.config.loading import from_table, to_table
from llama_jax.config.run import RunConfig
from llama_jax.data.reading import Problem
from llama_jax.data.record_source import read_conversations, read_preferences

MARK = "@"
Part = Literal["sources", "held_out"]
PARTS: tuple[Part, ...] = get_args(Part)


def resolved(config: RunConfig, inputs: Mapping[str, Path]) -> RunConfig:
    """The run with paths in place of its `@name` strings.

    Without the sources that aren't there yet, and without those in which nothing is.
    """
    table = to_table(config)
    for part in PARTS:
        table["data"][part] = [s for s in table["data"][part] if _is_there(s, inputs)]
    return from_table(RunConfig, _replaced(table, inputs), "rounds")


def sources_left(config: RunConfig, inputs: Mapping[str, Path]) -> bool:
    """Whether there is anything to train on."""
    return any(_is_there(source, inputs) for source in to_table(config)["data"]["sources"])


def empty_sources(config: RunConfig, inputs: Mapping[str, Path], part: Part) -> list[str]:
    """What to say of each source that was made and holds nothing of use."""
    made = (s for s in to_table(config)["data"][part] if _is_made(s, inputs))
    sources = (_source(table, inputs) for table in made)
    return [_why_empty(source) for source in sources if not _holds_records(source)]


def artifacts_of(run: RunConfig) -> tuple[set[str], set[str]]:
    """What a run can't be without, and what it takes where it is there."""
    table = to_table(run)
    sources = table["data"]["sources"]
    optional = {mark for source in sources for mark in _marks(source)}
    optional |= {mark for source in table["data"]["held_out"] for mark in _marks(source)}
    rest = {**table, "data": {**table["data"], "sources": [], "held_out": []}}
    needed = set(_marks(rest))
    if all(any(_marks(source)) for source in sources):
        # Without any of these there is nothing to train on.
        needed |= set(_marks(sources[0]))
    return needed, optional


def _is_there(table: Mapping[str, Any], inputs: Mapping[str, Path]) -> bool:
    if not any(_marks(table)):
        return True
    return _is_made(table, inputs) and _holds_records(_source(table, inputs))


def _is_made(table: Mapping[str, Any], inputs: Mapping[str, Path]) -> bool:
    """Whether it is one of the rounds' own, all of whose artifacts are there."""
    marks = set(_marks(table))
    return bool(marks) and marks <= inputs.keys()


def _source(table: Mapping[str, Any], inputs: Mapping[str, Path]) -> SourceConfig:
    return from_table(SourceConfig, _replaced(table, inputs), "rounds")


def _holds_records(source: SourceConfig) -> bool:
    """Whether there is at least one record of its part (and strengths); others aren't judged."""
    if source.conversations is not None:
        return any(not isinstance(c, Problem) for c in read_conversations(source.conversations))
    if source.preferences is not None:
        wanted = source.preferences.strengths
        return any(
            not isinstance(record, Problem) and any(p.strength in wanted for p in record.pairs)
            for record in read_preferences(source.preferences)
        )
    return True


def _why_empty(source: SourceConfig) -> str:
    records = source.conversations or source.preferences
    assert records is not None
    what = "conversation"
    if source.preferences is not None:
        of = source.preferences.strengths
        what = "pair" if set(of) == set(STRENGTHS) else f"pair of strength {' or '.join(of)}"
    part = "" if records.part == "all" else f" of part '{records.part}'"
    return f"no {what}{part} in source '{source.name}', {records.path}"


def _marks(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.startswith(MARK):
        yield value.removeprefix(MARK)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _marks(item)
    elif isinstance(value, list):
        for item in value:
            yield from _marks(item)


def _replaced(value: Any, inputs: Mapping[str, Path]) -> Any:
    if isinstance(value, str) and value.startswith(MARK):
        return str(inputs[value.removeprefix(MARK)].absolute())
    if isinstance(value, Mapping):
        return {key: _replaced(item, inputs) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, inputs) for item in value]
    return value
