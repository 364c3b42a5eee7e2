"""Everything that a step changes, as one pytree: what is donated, saved and restored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.optim.optimizer import restart_schedule

_MILLION = 1_000_000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state after `step` batches.

    A skipped batch counts as a step (the data moves on) but not as an update: the schedule's
    count is `step - skipped_steps`, so a run with skips ends that many rates before its schedule.
    """

    step: jax.Array  # int32, batches taken
    params: Any  # pure pytree of the model's parameters
    opt_state: Any
    key: jax.Array  # typed key of the run; a step's own is folded from it, so it never changes
    target_tokens: jax.Array  # int32 [2]: millions, and the rest; int32 alone ends at 2e9
    skipped_steps: jax.Array  # int32, batches that made no update
    consecutive_skips: jax.Array  # int32, non-finite ones in a row up to now
    # Running average of the parameters; {} where none is kept.
    averaged: Any = dataclasses.field(default_factory=dict)
    # Parameters that a step reads and never changes, by name: of a reference, a teacher, or the
    # base under adapters. Not in checkpoints: they come from where they came from at first.
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    frozen: Mapping[str, Any] | None = None,
    *,
    average: bool = False,
) -> TrainState:
    """The state before the first step; optimizer state and counters lie on the parameters' mesh.

    Args:
      params: what a step changes.
      optimizer: of the run.
      key: of the run.
      frozen: what a step only reads, by name.
      average: keep a running average of the parameters; the first is a copy of them.
    """
    sharding = _replicated(params)
    with jax.set_mesh(sharding.mesh):
        opt_state, counters = jax.jit(lambda params: (optimizer.init(params), _counters()))(params)
    key = jax.device_put(key, sharding)
    return TrainState(
        params=params,
        opt_state=opt_state,
        key=key,
        averaged=jax.tree.map(jnp.copy, params) if average else {},
        frozen=frozen or {},
        **counters,
    )


def abstract_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    frozen: Mapping[str, Any] | None = None,
    *,
    average: bool = False,
) -> TrainState:
    """`init_state` as shapes, dtypes and shardings, from abstract parameters; uses no memory."""
    sharding = _replicated(params)

    def place(leaf: jax.ShapeDtypeStruct, kind: str | None = None) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
        layout = NamedSharding(sharding.mesh, spec, memory_kind=kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    with jax.set_mesh(sharding.mesh):
        opt_state = jax.eval_shape(optimizer.init, params)
        # `eval_shape` forgets in which memory a leaf lies.
        types = jax.make_jaxpr(optimizer.init)(params).out_avals
        rest = jax.eval_shape(lambda: {"key": key, **_counters()})
    kinds = jax.tree.unflatten(jax.tree.structure(opt_state), [_memory_kind(t) for t in types])
    return TrainState(
        params=params,
        opt_state=jax.tree.map(place, opt_state, kinds),
        averaged=params if average else {},
        frozen=frozen or {},
        **jax.tree.map(place, rest),
    )


def saved_part(state: TrainState) -> TrainState:
    """What a checkpoint holds of a state, abstract or not."""
    return dataclasses.replace(state, frozen={})


def best_params(state: TrainState) -> Any:
    """The parameters that a run is judged by and gives away: their average where one is kept."""
    return state.averaged or state.params


def begin_stage(state: TrainState) -> TrainState:
    """The state at the start of another stage, such as annealing: weights and moments are kept.

    Steps and the schedule's count restart at 0, so the new schedule's first rate is the first one
    used. Target tokens go on being counted.
    """
    zero = jax.tree.map(jnp.zeros_like, (state.step, state.skipped_steps, state.consecutive_skips))
    return dataclasses.replace(
        state,
        opt_state=restart_schedule(state.opt_state),
        step=zero[0],
        skipped_steps=zero[1],
        consecutive_skips=zero[2],
    )


def target_tokens(state: TrainState) -> int:
    """Targets trained on so far."""
    millions, rest = (int(part) for part in state.target_tokens)
    return millions * _MILLION + rest


def add_tokens(total: jax.Array, tokens: jax.Array) -> jax.Array:
    """`TrainState.target_tokens` after a batch of `tokens` more targets."""
    rest = total[1] + jnp.round(tokens).astype(jnp.int32)
    return jnp.stack([total[0] + rest // _MILLION, rest % _MILLION])


def _memory_kind(type_: Any) -> str | None:
    return "pinned_host" if type_.memory_space == jax.memory.Space.Host else None


def _counters() -> dict[str, jax.Array]:
    zero = {
        name: jnp.zeros((), jnp.int32) for name in ("step", "skipped_steps", "consecutive_skips")
    }
    return {**zero, "target_tokens": jnp.zeros((2,), jnp.int32)}


def _replicated(params: Any) -> Any:
    """Sharding of a scalar on the mesh of the parameters, which are all on one."""
    sharding: Any = jax.tree.leaves(params)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec())
