"""A bar for each stage of what takes long, on stderr, where that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stage_progress(unit: str) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Given a stage's name, what is told (done, total) of it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def told(stage: str) -> Callable[[int, int], None]:
            task = tasks.setdefault(stage, bar.add_task(stage, total=None))
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield told
