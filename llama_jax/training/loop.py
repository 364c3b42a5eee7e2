"""The loop over steps: what happens in which order, and why. Stages differ in what they pass in."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.checkpoint.manager import Checkpoints
from llama_jax.config.run import CheckpointConfig, TrainingConfig
from llama_jax.data.batches import Batches
from llama_jax.data.device import to_device
from llama_jax.metrics.throughput import Part
from llama_jax.objectives.objective import Objective
from llama_jax.training.held_out import HeldOut, HeldOutBatches, evaluate
from llama_jax.training.profiling import Profiler
from llama_jax.training.reporting import Reporter
from llama_jax.training.state import TrainState, saved_part
from llama_jax.training.step import JittedStep
from llama_jax.training.stopping import StopRequest

# Set to `error` in tests: a second compilation of the step then ends the run.
RECOMPILATION_VARIABLE = "LLAMA_JAX_ON_RECOMPILATION"


class TrainingError(ValueError):
    """A run that can't go on; one line."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    mesh: Mesh
    train_step: JittedStep
    eval_step: JittedStep
    objective: Objective
    batches: Batches
    held_out: HeldOutBatches | None
    checkpoints: Checkpoints
    reporter: Reporter
    training: TrainingConfig
    checkpoint: CheckpointConfig
    profiler: Profiler


def run_steps(parts: Parts, state: TrainState, step: int, stop: StopRequest) -> TrainState:
    """Train from `step` to the last step, or until a stop is asked for.

    On return everything is on disk: the state after the last step done, and its metrics.

    Raises:
      TrainingError: too many steps in a row without a finite loss, or a recompilation in tests.
      CheckpointError: a save failed.
    """
    pending = Pending(parts)
    first = step
    while True:
        held_out = None
        stopping = stop.wanted(step)
        # Evaluate before saving: the checkpoint's held-out loss decides whether it is the best.
        if _evaluation_is_due(parts, step):
            pending.report()
            held_out = _evaluate(parts, state, step)
        if step > first and (stopping or _save_is_due(parts, step)):
            # Metrics first: a run killed after this save goes on from it and won't redo the step.
            pending.report()
            # Before the next batch is taken: state and data position are of the same step.
            _save(parts, state, step, held_out)
        if stopping or step == parts.training.steps:
            break
        # Waiting for data belongs to the trace of the step that waits.
        parts.profiler.before(step + 1)
        with parts.reporter.goodput.part("data_wait"):
            batch = to_device(next(parts.batches), parts.mesh)
        # JAX returns before the step is done, but not before it is compiled.
        part: Part = "compile" if step == first else "step"
        with parts.reporter.goodput.part(part), parts.profiler.step(step + 1):
            state, metrics = parts.train_step(state, batch)
        if step == first:
            parts.reporter.restart_clock()
        step += 1
        parts.profiler.after(step, metrics)
        # The step before this one is fetched now, while the device works: it never waits for us.
        with parts.reporter.goodput.part("step"):
            pending.replace(step, metrics)
        _check_compiled_once(parts.train_step)
        parts.checkpoints.raise_failure()
    with parts.reporter.goodput.part("save"):
        parts.checkpoints.wait()
    return state


class Pending:
    """The metrics of the newest step, still on the device."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._newest: tuple[int, Mapping[str, Any]] | None = None

    def replace(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Report the one held, and hold this one."""
        self.report()
        self._newest = (step, metrics)

    def report(self) -> None:
        """Wait for the step whose metrics are held, and report them.

        Raises:
          TrainingError: as many steps in a row as the config allows made no update.
        """
        if self._newest is None:
            return
        step, arrays = self._newest
        self._newest = None
        metrics = {name: float(value) for name, value in jax.device_get(dict(arrays)).items()}
        self._parts.reporter.step(step, metrics)
        limit = self._parts.training.max_skipped_steps
        if metrics["consecutive_skips"] >= limit:
            raise TrainingError(
                f"loss or gradient was not finite in {limit} steps in a row, up to step {step}; "
                "the last checkpoint is from before or during them. A lower schedule.peak, a "
                "longer warm-up or a look at the data around that step may help"
            )
        if metrics["skipped"]:
            self._parts.reporter.say(
                f"step {step} was skipped: loss {metrics['loss']:.4g}, "
                f"gradient norm {metrics['grad_norm']:.4g}, {metrics['tokens']:.0f} targets"
            )


def _evaluation_is_due(parts: Parts, step: int) -> bool:
    if parts.held_out is None or step == 0 or parts.reporter.evaluated(step):
        return False
    every = parts.training.eval_every
    return step == parts.training.steps or (every is not None and step % every == 0)


def _save_is_due(parts: Parts, step: int) -> bool:
    return step == parts.training.steps or step % parts.checkpoint.every == 0


def _evaluate(parts: Parts, state: TrainState, step: int) -> HeldOut:
    assert parts.held_out is not None
    with parts.reporter.goodput.part("eval"):
        figures = evaluate(state, parts.eval_step, parts.objective, parts.held_out, parts.mesh)
    parts.reporter.held_out(step, figures)
    parts.reporter.restart_clock()
    return figures


def _save(parts: Parts, state: TrainState, step: int, held_out: HeldOut | None) -> None:
    parts.reporter.flush()
    loss = None if held_out is None else held_out.loss
    with parts.reporter.goodput.part("save"):
        parts.checkpoints.save(step, saved_part(state), parts.batches.position, held_out_loss=loss)
    parts.reporter.restart_clock()


def _check_compiled_once(train_step: JittedStep) -> None:
    count = train_step.compilations
    if count <= 1:
        return
    message = (
        f"the training step has been compiled {count} times: the shape, dtype or layout of the "
        "state or of a batch changes between steps, which costs a compilation each time"
    )
    if os.environ.get(RECOMPILATION_VARIABLE) == "error":
        raise TrainingError(message)
    # Python shows a warning once for a place, so a run isn't flooded.
    warnings.warn(message, stacklevel=2)
