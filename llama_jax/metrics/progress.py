"""The line that a person watches: a bar on a terminal, now and then a line in a log file."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LOG_EVERY_S = 10.0


class TrainingProgress:
    """Loss, tokens/s, MFU and time left of a run.

    Args:
      console: where to draw; anything but a terminal gets a line every `LOG_EVERY_S` seconds.
      steps: the last step.
      done: steps that an earlier process has done.
      enabled: False says nothing at all.
    """

    def __init__(self, console: Console, steps: int, done: int, *, enabled: bool) -> None:
        self._console, self._steps, self._enabled = console, steps, enabled
        self._bar: Progress | None = None
        self._last_line_s = -LOG_EVERY_S
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[line]}"),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=steps, completed=done, line="")

    def __enter__(self) -> "TrainingProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, step: int, *, loss: float, tokens_per_s: float, mfu: float | None, step_s: float
    ) -> None:
        """Show the figures of `step`; `step_s` is the mean time a step takes now."""
        parts = [f"loss {loss:.4f}", f"{format_count(tokens_per_s)} tokens/s"]
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        parts.append(f"{format_duration((self._steps - step) * step_s)} left")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=" · ".join(parts))
        elif self._enabled and self._is_due(step):
            self._console.print(
                f"step {step}/{self._steps} · {' · '.join(parts)}", highlight=False, soft_wrap=True
            )

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, highlight=False, soft_wrap=True, markup=False)

    def _is_due(self, step: int) -> bool:
        now = time.monotonic()
        if step < self._steps and now - self._last_line_s < LOG_EVERY_S:
            return False
        self._last_line_s = now
        return True


def format_duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`, `4d03h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(number: float) -> str:
    """Three figures with a unit: `950`, `12.3k`, `4.56M`, `1.20B`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            scaled = number / size
            digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{number:.0f}"


def format_bytes(number: float) -> str:
    """Binary units: `512 B`, `1.5 KiB`, `2.3 GiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"
