"""`train --profile 10:15`: a trace of some steps, which XProf and TensorBoard open.

Process 0 alone traces: its devices run the same program as all others. The trace goes to
`profile/plugins/profile/<time>/` in the run directory.
"""

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath

from llama_jax.config.loading import ConfigError

FOLDER = "profile"
OPTION = "--profile"
# Each traced step of a large model is many megabytes, and XProf reads a file of 2 GiB at most.
MOST_STEPS = 100


@dataclasses.dataclass(frozen=True)
class ProfileRange:
    """Steps `first` to `last`, both of them traced; the first step of a run is 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "ProfileRange":
        """`10:15`, or `10` for a single step.

        Raises:
          ConfigError: not of that form, the wrong way round, or too long.
        """
        found = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
        if found is None:
            raise ConfigError(f"'{text}' is not of the form FIRST:LAST, as in 10:15", key=OPTION)
        first = int(found[1])
        last = int(found[2]) if found[2] else first
        if first < 1:
            raise ConfigError("the first step is 1", key=OPTION)
        if last < first:
            raise ConfigError(f"step {last} comes before step {first}", key=OPTION)
        if last - first >= MOST_STEPS:
            raise ConfigError(
                f"{last - first + 1} steps; a trace of more than {MOST_STEPS} can't be opened",
                key=OPTION,
            )
        return cls(first, last)

    def check(self, steps: int, done: int) -> None:
        """See that a run of `steps` steps, of which `done` are done, comes by the first one.

        Raises:
          ConfigError: it doesn't.
        """
        if self.last > steps:
            raise ConfigError(f"the run ends with step {steps}", key=OPTION)
        if self.first <= done:
            raise ConfigError(
                f"the run goes on from step {done}; the next one that can be traced is {done + 1}",
                key=OPTION,
            )


class Profiler:
    """Traces the steps of a range; the loop calls it around each step. No range: does nothing."""

    def __init__(
        self,
        steps: ProfileRange | None = None,
        run_dir: epath.Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._range = steps if jax.process_index() == 0 else None
        self._run_dir, self._say = run_dir, say
        self._traced_to: tempfile.TemporaryDirectory[str] | None = None

    def before(self, step: int) -> None:
        """Start to trace if `step`, which comes next, is the first of the range."""
        if self._range is None or step != self._range.first:
            return
        self._traced_to = tempfile.TemporaryDirectory(prefix="llama_jax_profile_")
        options = jax.profiler.ProfileOptions()
        # Each call of a Python function as an event would hide the device's.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._traced_to.name, profiler_options=options)

    def step(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Around the dispatch of a step: what its device time is accounted to in the trace."""
        if self._traced_to is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, result: Any) -> None:
        """Stop after the last step of the range, once `result`, which it gives, is there."""
        if self._range is not None and self._traced_to is not None and step == self._range.last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write what has been traced, also of a range that was cut short."""
        if self._traced_to is None or self._run_dir is None:
            return
        with self._traced_to as folder:
            self._traced_to = None
            jax.profiler.stop_trace()
            written = _copy(Path(folder), self._run_dir / FOLDER)
        self._say(f"profile: {written}; open it with: tensorboard --logdir {self._run_dir}")


def _copy(source: Path, target: epath.Path) -> epath.Path:
    """Copy the trace's files to a path of any kind; the folder that they are in."""
    where = target
    for file in sorted(source.rglob("*")):
        if file.is_file():
            copy = target / file.relative_to(source).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
            where = copy.parent
    return where
