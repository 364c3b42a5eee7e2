"""The bar of a build: bytes of source files read, shards, speed, time left."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class BuildProgress:
    """Draws on stderr, so that what is printed stays clean; `enabled` False draws nothing."""

    def __init__(self, total_bytes: int, *, enabled: bool) -> None:
        self._bar = Progress(
            TextColumn("tokenising"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TextColumn("{task.fields[made]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._bar.add_task("tokenising", total=total_bytes, made="")

    def __enter__(self) -> "BuildProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, bytes_read: int, made: str) -> None:
        """Show how far reading is; it is at most a few shards ahead of tokenising."""
        self._bar.update(self._task, completed=bytes_read, made=made)

    def finish(self) -> None:
        """Fill the bar: a limit on the text ends it at another size than the files promised."""
        done = self._bar.tasks[self._task].completed
        self._bar.update(self._task, total=done, completed=done)
