"""How fast, and how much of the machine: tokens a second, MFU, and goodput.

FLOPs a token come in as a number: the formula is `llama_jax.models.accounting`'s alone. The
devices' peaks are `llama_jax.config.hardware`'s.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Literal

import jax

from llama_jax.config.hardware import peak_flops

Part = Literal["step", "data_wait", "compile", "eval", "save", "other"]


def model_flops_utilization(
    tokens_per_s: float,
    flops_per_token: float,
    devices: list[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
) -> float | None:
    """MFU: the model's FLOPs done a second, over the peak of all devices; None when unknown."""
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        return None
    return tokens_per_s * flops_per_token / (peak * len(devices))


@dataclasses.dataclass
class Goodput:
    """Where the wall time of this process went.

    Time in no named part is "other". Goodput is the share of all time since the start that was
    spent in training steps: what a run would lose less of with faster saves, data or compilation.
    """

    start_s: float = dataclasses.field(default_factory=time.perf_counter)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the time of a `with` block under `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begin)

    def add(self, name: Part, seconds: float) -> None:
        """Count `seconds` under `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def total_s(self) -> float:
        """Wall time since the start."""
        return time.perf_counter() - self.start_s

    def fraction(self) -> float:
        """Goodput, between 0 and 1."""
        return self.seconds.get("step", 0.0) / max(self.total_s(), 1e-9)

    def summary(self) -> dict[str, float]:
        """Seconds by part, "other" included; they add up to the total."""
        total = self.total_s()
        return {**self.seconds, "other": total - sum(self.seconds.values()), "total": total}


class Rate:
    """Tokens a second over the last few steps, so that one slow step doesn't hide the trend."""

    def __init__(self, window: int = 20) -> None:
        self._window = window
        self._steps: list[tuple[float, float]] = []

    def update(self, tokens: float, seconds: float) -> float:
        """Add a step; returns tokens a second over the window."""
        self._steps = [*self._steps, (tokens, seconds)][-self._window :]
        return sum(t for t, _ in self._steps) / max(sum(s for _, s in self._steps), 1e-9)

    def seconds_per_step(self) -> float:
        """Mean over the window; 0 before the first step."""
        return sum(s for _, s in self._steps) / max(len(self._steps), 1)
