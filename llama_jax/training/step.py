"""The jitted training step, a pure function of (state, batch), and the evaluation step.

It alone knows about microbatches. Order of things: sum losses and gradients over microbatches and
mesh, divide once by the number of targets, take the norm, clip, update; and if anything was not
finite, or there was nothing to learn from, keep the old parameters and moments.

Letters: B batch, T length, M microbatches.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import TrainingConfig
from llama_jax.models.narrow import stand_ins
from llama_jax.objectives.objective import OF_PARTS, Batch, Metrics, Objective
from llama_jax.optim.optimizer import schedule_count
from llama_jax.optim.schedule import Schedule
from llama_jax.training.networks import Networks
from llama_jax.training.state import TrainState, add_tokens


class JittedStep:
    """A jitted step that knows how often it was compiled; more than once in a run is a fault."""

    def __init__(self, step: Callable[..., Any], *, donate_argnums: tuple[int, ...] = ()) -> None:
        self.compilations = 0

        def counted(*args: Any) -> Any:
            # Runs only while tracing, once for each new set of shapes, dtypes and layouts. (The
            # size of jit's own cache also grows with layouts that are merely spelt differently.)
            self.compilations += 1
            return step(*args)

        self._jitted = jax.jit(counted, donate_argnums=donate_argnums)

    def __call__(self, *args: Any) -> Any:
        """The step, compiled at the first call."""
        return self._jitted(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """For compiling ahead of time; arguments may be abstract."""
        return self._jitted.lower(*args)


def make_train_step(
    networks: Networks,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    config: TrainingConfig,
    *,
    gradient_dtype: str = "float32",
) -> JittedStep:
    """The jitted (state, batch) -> (state, metrics); the state passed in is donated, so it is gone.

    Call it under `jax.set_mesh`. Metrics are float32 scalars: means over the objective's first
    count of `loss` and of its sums, its counts, `grad_norm` before clipping, `param_norm` of what
    is trained, `learning_rate`, `skipped` (1 where no update was made), `skipped_steps` and
    `consecutive_skips`.

    Args:
      gradient_dtype: in which a microbatch's gradients of matrices are kept between its backward
        pass and the sum or update, which are in float32; the compute dtype loses nothing.

    Raises (at the first call):
      ConfigError: microbatches that don't divide a device's share of the batch.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        sums, grads = _sum_microbatches(
            networks, objective, state, batch, key, config.microbatches, gradient_dtype
        )
        # Nothing to learn from: every sum is 0, and so is every mean.
        count = sums[objective.counts[0]]
        share = 1.0 / jnp.where(count > 0, count, 1.0)
        counts = {name: sums[name] for name in objective.counts}
        means = {
            name: value * share
            for name, value in sums.items()
            if name not in counts and not name.startswith(OF_PARTS)
        }
        grad_norm = optax.tree.norm(_float32(grads)) * share
        # A non-finite gradient anywhere makes the norm non-finite, at no cost of its own.
        finite = jnp.isfinite(means["loss"]) & jnp.isfinite(grad_norm)
        updated = finite & (count > 0)

        rate = schedule(schedule_count(state.opt_state))
        # One factor for the mean and the clip, so that gradients are read twice, never rewritten.
        factor = share * _clip_factor(grad_norm, config.clip_norm)
        scaled = jax.tree.map(lambda grad: _row_major(grad).astype(jnp.float32) * factor, grads)
        params, opt_state = _update(optimizer, state, scaled, updated)
        taken = state.step + 1
        params = _where(updated, params, state.params)
        averaged = state.averaged
        if config.ema_decay is not None:
            number = taken - state.skipped_steps
            averaged = _averaged(averaged, params, config.ema_decay, number, updated)
        new_state = dataclasses.replace(
            state,
            step=taken,
            params=params,
            averaged=averaged,
            opt_state=_where(updated, opt_state, state.opt_state),
            target_tokens=add_tokens(state.target_tokens, jnp.where(updated, sums["tokens"], 0.0)),
            skipped_steps=state.skipped_steps + ~updated,
            # A batch without targets says nothing about the run's health either way.
            consecutive_skips=jnp.where(
                finite,
                jnp.where(updated, 0, state.consecutive_skips),
                state.consecutive_skips + 1,
            ),
        )
        metrics = {
            **means,
            **counts,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(new_state.params),
            "learning_rate": rate,
            "skipped": ~updated,
            "skipped_steps": new_state.skipped_steps,
            "consecutive_skips": new_state.consecutive_skips,
        }
        return new_state, {name: jnp.float32(value) for name, value in metrics.items()}

    return JittedStep(step, donate_argnums=(0,))


def make_eval_step(networks: Networks, objective: Objective) -> JittedStep:
    """A jitted function of (params, frozen, batch) to the objective's sums, `loss` among them.

    Sums, so that held-out batches of different sizes weigh by what they hold: the caller adds up
    and divides once. It is given the same key each time: evaluation is repeatable.
    """

    def step(params: Any, frozen: Mapping[str, Any], batch: Batch) -> Metrics:
        model, others = networks.model(params, frozen), networks.read_only(frozen)
        loss, sums = objective(model, batch, jax.random.key(0), others)
        return {**sums, "loss": loss}

    return JittedStep(step)


def split_microbatches(batch: Batch, microbatches: int) -> Batch:
    """[B, T] arrays to [M, B / M, T], each device cutting its own rows: nothing is sent.

    Microbatch m so holds the m-th part of every device's rows, not the m-th part of the batch.

        8 rows on 2 devices, 2 microbatches:  0 1 2 3 | 4 5 6 7  ->  0 1 | 4 5,  2 3 | 6 7

    Raises:
      ConfigError: a device's rows don't divide into `microbatches`.
    """
    sharding = jax.typeof(batch["tokens"]).sharding
    axes = (*sharding.spec, None)[0]
    shards = 1 if sharding.mesh.empty else _shards(axes, sharding.mesh.shape)
    rows = batch["tokens"].shape[0] // shards
    if rows % microbatches:
        raise ConfigError(
            f"{microbatches} does not divide the {rows} sequences that each of {shards} batch "
            f"shards has of data.batch_size, {rows * shards}",
            key="training.microbatches",
        )

    def split(rows_BT: jax.Array) -> jax.Array:
        return rows_BT.reshape(microbatches, -1, *rows_BT.shape[1:])

    if sharding.mesh.empty:
        return jax.tree.map(split, batch)
    specs = {
        name: PartitionSpec(*(*jax.typeof(array).sharding.spec, None, None)[: min(array.ndim, 2)])
        for name, array in batch.items()
    }
    on_each = jax.shard_map(
        lambda arrays: jax.tree.map(split, arrays),
        mesh=sharding.mesh,
        in_specs=(specs,),
        out_specs={name: PartitionSpec(None, *spec) for name, spec in specs.items()},
    )
    return on_each(batch)


def _sum_microbatches(
    networks: Networks,
    objective: Objective,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    microbatches: int,
    gradient_dtype: str,
) -> tuple[Metrics, Any]:
    """The objective's sums, with `loss`, and the gradient of the summed loss."""
    differentiated, join = stand_ins(state.params, gradient_dtype)

    def loss_of(leaves: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        model = networks.model(join(leaves), state.frozen)
        return objective(model, batch, key, networks.read_only(state.frozen))

    def one(batch: Batch, key: jax.Array) -> tuple[Metrics, Any]:
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, sums), grads = gradient(differentiated, batch, key)
        return {**sums, "loss": loss}, grads

    if microbatches == 1:
        return one(batch, key)

    def add(total: Any, inputs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, _float32(one(*inputs))), None

    inputs = (split_microbatches(batch, microbatches), jax.random.split(key, microbatches))
    first = jax.tree.map(lambda array: array[0], inputs)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: _float32(one(*first))))
    return jax.lax.scan(add, zeros, inputs)[0]


def _update(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Any, updated: jax.Array
) -> tuple[Any, Any]:
    extra = optax.with_extra_args_support(optimizer)
    updates, opt_state = extra.update(grads, state.opt_state, state.params, updated=updated)
    return optax.apply_updates(state.params, updates), opt_state


def _averaged(
    averaged: Any, params: Any, decay: float, count: jax.Array, updated: jax.Array
) -> Any:
    """The running average after the `count`-th update."""
    # At first the average forgets faster, or it would be about the weights of the start for long.
    keep = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    share = jnp.where(updated, 1.0 - keep, 0.0)

    def one(average: jax.Array, param: jax.Array) -> jax.Array:
        wide = average.astype(jnp.float32)
        return (wide + share * (param.astype(jnp.float32) - wide)).astype(average.dtype)

    return jax.tree.map(one, averaged, params)


def _clip_factor(norm: jax.Array, limit: float | None) -> jax.Array | float:
    return 1.0 if limit is None else jnp.minimum(1.0, limit / norm)  # a norm of 0 gives inf: 1


def _row_major(grad: jax.Array) -> jax.Array:
    # The state's layout in memory. Left to itself, XLA keeps a gradient as the product made it,
    # transposed, say, and copies parameter and moments to match: three copies instead of one.
    return with_layout_constraint(grad, Layout(tuple(range(grad.ndim))))


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    # A select, not a branch: it fuses with the update and keeps the donated buffers in place. What
    # lies in the host's memory was selected while it was streamed through the device.
    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        on_host = jax.typeof(new).memory_space == jax.memory.Space.Host
        return new if on_host else jnp.where(condition, new, old)

    return jax.tree.map(select, new, old)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.astype(jnp.float32), tree)


def _shards(axes: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(sizes[name] for name in names)
