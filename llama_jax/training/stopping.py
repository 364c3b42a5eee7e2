"""SIGTERM and Ctrl-C: the first asks the loop to save and end, the second ends at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers the first signal while it is entered; `wanted(step)` is asked between steps.

    With several processes a SIGTERM reaches them at different steps, and saving needs all of them
    at the same one: there JAX's preemption service, which has its own handler, picks the step.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """0, or 128 plus the signal's number as shells report it: 130 Ctrl-C, 143 SIGTERM."""
        return 0 if self.signal_number is None else 128 + self.signal_number

    def wanted(self, step: int) -> bool:
        """Whether to save and end now; every process must ask at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            # Not an exception: cleaning up would wait for the save that is taking too long.
            os._exit(128 + number)
        self.signal_number = number
        # os.write, because a signal may come in the middle of another print.
        os.write(2, b"\nsaving, then stopping; once more to stop at once\n")
