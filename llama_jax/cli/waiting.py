"""Something to look at until a reply begins: the first one waits for programs to be compiled."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class Waiting:
    """A turning sign on stderr, where that is a terminal, until `end` is called or text comes."""

    def __init__(self, text: str) -> None:
        console = Console(file=sys.stderr)
        self._status = console.status(text) if console.is_terminal else None
        if self._status is not None:
            self._status.start()

    def end(self) -> None:
        """Take the sign away; again is no harm."""
        if self._status is not None:
            self._status.stop()
            self._status = None


@contextmanager
def waiting(text: str) -> Iterator[Waiting]:
    """A `Waiting` that is gone whatever happens."""
    sign = Waiting(text)
    try:
        yield sign
    finally:
        sign.end()
