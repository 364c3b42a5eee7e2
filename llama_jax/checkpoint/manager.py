"""The sequence of checkpoints of one run: what is kept, and which one a restart gets.

Owns saving in the background, eviction, and falling back past a damaged checkpoint. Doesn't know
what a train state is: any pytree of arrays is stored as a flat dict of leaf names, so that
a checkpoint can be listed and read without the classes that wrote it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from llama_jax.config.run import CheckpointConfig

Position = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that can't be written, or none that can be read. One line."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held: the state after `step` steps, and where the data stood then."""

    step: int
    state: Any
    position: Position


class Checkpoints:
    """Checkpoints in `directory`, a local path or one of any scheme that `etils.epath` knows.

    Kept are the last `keep_last`, every `keep_every`-th step, and the one with the lowest held-out
    loss. The newest is always among the last, so no rule can evict it.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        config: CheckpointConfig,
        notify: Callable[[str], None] = print,
    ) -> None:
        self.directory = epath.Path(directory)
        self._notify = notify
        self._losses: dict[int, float] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_preservation(config, self._losses),
            cleanup_tmp_directories=True,
            step_prefix="step",
        )
        # Handlers are named so that metadata can be read before anything was saved or restored.
        handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )
        self._load_losses()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The kept checkpoint with the lowest held-out loss, or None when none was evaluated."""
        return _best(self.steps(), self._losses)

    def held_out_loss(self, step: int) -> float | None:
        """The held-out loss with which `step` was saved."""
        return self._losses.get(step)

    def save(
        self, step: int, state: Any, position: Position, *, held_out_loss: float | None = None
    ) -> bool:
        """Start to save; the device buffers may be donated as soon as this returns.

        Returns:
          False when that step is on disk already.

        Raises:
          CheckpointError: the save before this one failed in the background.
        """
        self.raise_failure()
        if step in self._manager.all_steps():
            return False
        if held_out_loss is not None:
            self._losses[step] = held_out_loss
        run = {"position": position, "held_out_loss": held_out_loss}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_flatten(state)), run=ocp.args.JsonSave(run)
        )
        with _failures_of(f"saving step {step}"):
            # Forced: the loop has decided that a save is due, also between two multiples.
            return self._manager.save(step, args=items, force=True)

    def raise_failure(self) -> None:
        """Raise the failure of a save in the background, if there was one.

        Raises:
          CheckpointError: naming the cause.
        """
        with _failures_of("a save in the background"):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Block until the save under way is complete on disk.

        Raises:
          CheckpointError: it failed.
        """
        with _failures_of("a save in the background"):
            self._manager.wait_until_finished()

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest readable checkpoint, laid out as `abstract_state` says; None if there is none.

        A checkpoint that can't be read is passed over, with a notice, and put aside under
        `damaged/` so that the run may save that step again.

        Args:
          abstract_state: pytree of `ShapeDtypeStruct` with shardings, which decide where each
            leaf goes; the shardings with which the checkpoint was written don't matter.

        Raises:
          CheckpointError: the checkpoint is of another model, or no checkpoint can be read.
        """
        damaged: dict[int, Exception] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, abstract_state)
            except CheckpointError:
                raise
            except Exception as error:
                damaged[step] = error
                continue
            # Only now is it known that the others were at fault, not what was asked for.
            self._put_aside(damaged, restored.step)
            return restored
        if damaged:
            newest = max(damaged)
            raise CheckpointError(
                f"none of {len(damaged)} checkpoints in {self.directory} can be read; "
                f"step {newest}: {_one_line(damaged[newest])}"
            ) from damaged[newest]
        return None

    def close(self) -> None:
        """Wait for the save under way, and release threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _restore(self, step: int, abstract_state: Any) -> Restored:
        wanted = _flatten(abstract_state)
        self._check_same_tensors(step, wanted)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(wanted), run=ocp.args.JsonRestore()
        )
        found: Any = self._manager.restore(step, args=items)
        leaves = [_checked(name, found.state[name], leaf) for name, leaf in wanted.items()]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return Restored(step, state, found.run["position"])

    def _load_losses(self) -> None:
        # Not Orbax's own metrics: one unreadable file of those keeps the manager from opening.
        for step in self.steps():
            try:
                items = ocp.args.Composite(run=ocp.args.JsonRestore())
                found: Any = self._manager.restore(step, args=items)
                loss = found.run["held_out_loss"]
            except Exception:
                continue  # damaged; restore_latest will say so if that step matters
            if loss is not None:
                self._losses[step] = float(loss)

    def _check_same_tensors(self, step: int, wanted: Mapping[str, Any]) -> None:
        """Tell a checkpoint of another model from a damaged one, by the shapes alone."""
        metadata = self._manager.item_metadata(step).state
        if metadata is None:
            raise FileNotFoundError(f"step {step} has no metadata of its state")
        stored = {name: tuple(array.shape) for name, array in metadata.tree.items()}
        asked = {name: _stored_shape(leaf) for name, leaf in wanted.items()}
        for name in sorted(stored.keys() | asked.keys()):
            if stored.get(name) != asked.get(name):
                raise CheckpointError(
                    f"{self.directory}, step {step}, is of another model: tensor {name} is "
                    f"{stored.get(name, 'absent')} there and {asked.get(name, 'absent')} here"
                )

    def _put_aside(self, damaged: Mapping[int, Exception], restored: int) -> None:
        for step, error in damaged.items():
            self._notify(
                f"checkpoint of step {step} is damaged ({_one_line(error)}); "
                f"going on from step {restored}"
            )
        if not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                self._rename_damaged(step)
        ocp.multihost.sync_global_processes("damaged checkpoints put aside")
        self._manager.reload()

    def _rename_damaged(self, step: int) -> None:
        folder = self.directory.parent / "damaged"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"step_{step}"
        if target.exists():
            target.rmtree()
        (self.directory / f"step_{step}").rename(target)


class _failures_of:  # noqa: N801 (reads as a statement)
    """Turn what Orbax raises into one line that says what failed."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self._what} failed: {_one_line(error)}") from error


class _KeepBest:
    """Orbax preservation policy: the checkpoint with the lowest held-out loss."""

    def __init__(self, losses: Mapping[int, float]) -> None:
        self._losses = losses

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        best = _best([checkpoint.step for checkpoint in checkpoints], self._losses)
        return [checkpoint.step == best for checkpoint in checkpoints]


def _best(steps: Sequence[int], losses: Mapping[int, float]) -> int | None:
    # NaN compares false with everything, and would win or lose by its place in the list.
    known = [step for step in steps if math.isfinite(losses.get(step, math.nan))]
    return min(known, key=lambda step: losses[step], default=None)


def _preservation(
    config: CheckpointConfig, losses: Mapping[int, float]
) -> policies.PreservationPolicy:
    kept: list[policies.PreservationPolicy] = [policies.LatestN(config.keep_last)]
    if config.keep_every is not None:
        kept.append(policies.EveryNSteps(config.keep_every))
    if config.keep_best:
        kept.append(_KeepBest(losses))
    return policies.AnyPreservationPolicy(kept)


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of the state have one name"
    return named


def _checked(name: str, leaf: Any, wanted: Any) -> Any:
    # A harmed metadata file can leave the data readable as something else, such as raw key words.
    if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
        raise TypeError(f"{name} was read as {leaf.dtype}{leaf.shape}")
    return leaf


def _stored_shape(leaf: Any) -> tuple[int, ...]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return tuple(jax.eval_shape(jax.random.key_data, leaf).shape)
    return tuple(leaf.shape)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
