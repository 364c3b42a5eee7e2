"""One place that tells every listener about a step: records, TensorBoard, W&B, the progress bar.

Only process 0 writes; on the others every method does nothing.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import jax
from etils import epath
from rich.console import Console

from llama_jax.config.run import MetricsConfig
from llama_jax.metrics.event_files import EventFileWriter
from llama_jax.metrics.progress import TrainingProgress
from llama_jax.metrics.records import Record, RecordWriter, read_records
from llama_jax.metrics.throughput import Goodput, Rate, model_flops_utilization
from llama_jax.metrics.wandb import WandbWriter
from llama_jax.training.held_out import HeldOut

RECORDS_FILE = "metrics.jsonl"


class ScalarWriter(Protocol):
    """What TensorBoard and W&B have in common."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the scalars of one step."""
        ...

    def flush(self) -> None:
        """Make what was written visible."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What the figures need to know of the run: its last step, and its model's cost."""

    name: str
    steps: int
    flops_per_token: float
    config: Mapping[str, Any]


class Reporter:
    """Takes each step's figures and passes them on."""

    def __init__(
        self,
        run_dir: epath.Path,
        config: MetricsConfig,
        facts: RunFacts,
        console: Console,
        *,
        from_step: int,
    ) -> None:
        self._facts, self._writes = facts, jax.process_index() == 0
        self.goodput, self._rate = Goodput(), Rate()
        self._mark_s = time.perf_counter()
        self._records: RecordWriter | None = None
        self._writers: list[ScalarWriter] = []
        path = run_dir / RECORDS_FILE
        if self._writes:
            self._records = RecordWriter(path, from_step)
            if config.tensorboard:
                self._writers.append(EventFileWriter(run_dir / "tensorboard", from_step))
            if config.wandb_project is not None:
                self._writers.append(WandbWriter(config.wandb_project, facts.name, facts.config))
        # Every process must agree on which evaluations are still to be done.
        self._evaluated = {
            record["step"]
            for record in read_records(path)
            if "held_out" in record and record["step"] <= from_step
        }
        self._progress = TrainingProgress(
            console, facts.steps, from_step, enabled=config.progress and self._writes
        )

    def evaluated(self, step: int) -> bool:
        """Whether the held-out loss after `step` has been recorded, now or before a restart."""
        return step in self._evaluated

    def restart_clock(self) -> None:
        """Leave what happened since the last step out of its duration: a save, an evaluation."""
        self._mark_s = time.perf_counter()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report a finished step; the time since the last report is taken for its duration."""
        now = time.perf_counter()
        tokens_per_s = self._rate.update(metrics["tokens"], now - self._mark_s)
        self._mark_s = now
        mfu = model_flops_utilization(tokens_per_s, self._facts.flops_per_token, jax.devices())
        speed = {"tokens_per_s": tokens_per_s, "goodput": self.goodput.fraction()}
        if mfu is not None:
            speed["mfu"] = mfu
        if self._records is not None:
            # Flushed each step: what a killed run has told is then never behind its checkpoint.
            self._records.write(step, {**metrics, **speed})
            self._records.flush()
        self._scalars(step, "train", metrics)
        self._scalars(step, "speed", speed)
        self._scalars(step, "seconds", self.goodput.summary())
        self._progress.update(
            step,
            loss=metrics["loss"],
            tokens_per_s=tokens_per_s,
            mfu=mfu,
            step_s=self._rate.seconds_per_step(),
        )

    def held_out(self, step: int, figures: HeldOut) -> None:
        """Report an evaluation after `step`."""
        self._evaluated.add(step)
        values = figures.to_table()
        if self._records is not None:
            self._records.write(step, {"held_out": values})
            self._records.flush()
        self._scalars(step, "held_out", values)
        told = [f"loss {figures.loss:.4f}"]
        if figures.bits_per_byte is not None:
            told = [f"{told[0]} nats a token", f"{figures.bits_per_byte:.3f} bits a byte"]
        told += [f"{name} {value:.4g}" for name, value in figures.figures.items()]
        self.say(f"step {step}: held-out {', '.join(told)}")

    def say(self, message: str) -> None:
        """A line for whoever watches."""
        if self._writes:
            self._progress.say(message)

    def flush(self) -> None:
        """Make everything visible."""
        for writer in (self._records, *self._writers):
            if writer is not None:
                writer.flush()

    def __enter__(self) -> "Reporter":
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, traceback)
        for writer in (self._records, *self._writers):
            if writer is not None:
                writer.close()

    def _scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, {f"{group}/{name}": value for name, value in values.items()})


def loss_records(run_dir: epath.Path) -> Sequence[Record]:
    """Everything recorded of the run so far."""
    return read_records(run_dir / RECORDS_FILE)
