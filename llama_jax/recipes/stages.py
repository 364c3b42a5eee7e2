"""A stage: named inputs to named outputs, by a function. `rounds` runs and records it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a stage is given.

    Attributes:
      folder: its own, where an earlier call of it that was killed may have left its work.
      inputs: paths by artifact: all that it needs, and what there is of those it uses.
      say: one line to whoever watches.
    """

    folder: Path
    inputs: Mapping[str, Path]
    say: Say


@dataclasses.dataclass(frozen=True)
class Result:
    """What a stage made.

    Attributes:
      outputs: paths by artifact, one for each that it makes.
      figures: JSON values that reports show.
      skipped: why it made nothing, where there was nothing to do it with.
    """

    outputs: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    skipped: str | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a round.

    Attributes:
      name: unique in its round.
      needs: artifacts that must be there.
      uses: artifacts that it takes where they are there.
      makes: artifacts that are there afterwards; later stages get these, not earlier ones.
      stays: of `makes`, what stays as it was where the stage is skipped; the rest is gone then.
      trains: a round in which every stage that does is skipped is an error.
      settings: JSON values; all that its outputs depend on beside the inputs.
      run: does it. Called again after a kill, it goes on with what it finds in its folder.
    """

    name: str
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    run: Callable[[Context], Result]
    uses: tuple[str, ...] = ()
    stays: tuple[str, ...] = ()
    trains: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
