"""What a step is made of, from a run's config and a mesh: the one place where both `train` and
`plan` get it, so that what is planned is what is run.

Everything here is abstract (shapes, dtypes, shardings): no array is made, so the mesh may be one of
devices that exist only in a topology's description.
"""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from llama_jax.config.run import DistillConfig, DPOConfig, RunConfig
from llama_jax.data.device import field_sharding, host_rows
from llama_jax.data.fields import Field, batch_fields
from llama_jax.kernels.self_check import choose_and_check
from llama_jax.objectives.objective import Objective, make_objective
from llama_jax.optim.optimizer import make_optimizer
from llama_jax.optim.schedule import Schedule, make_schedule
from llama_jax.training.networks import Networks, abstract_networks
from llama_jax.training.state import TrainState, abstract_state
from llama_jax.training.step import JittedStep, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The parts of a run's step.

    Attributes:
      abstract_state: as `state.init_state` makes it, without memory.
      abstract_batch: [B, T] arrays as `data.device.to_device` makes them, without memory.
      train_step, eval_step: jitted, not yet compiled; call or lower them under `jax.set_mesh`.
    """

    networks: Networks
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    train_step: JittedStep
    eval_step: JittedStep
    optimizer: optax.GradientTransformation
    schedule: Schedule
    objective: Objective


def assemble(config: RunConfig, mesh: Mesh) -> Assembly:
    """Everything that a run's step needs, for a mesh of real or merely described devices.

    Raises:
      ConfigError: the mesh doesn't divide a parameter or the batch.
    """
    schedule = make_schedule(config.schedule, config.training.steps)
    optimizer = make_optimizer(config.optimizer, schedule, config.seed)
    objective = make_objective(config.objective, config.execution)
    networks, params, frozen = abstract_networks(config, objective, mesh)
    # A key itself would be an array on the mesh's devices, which a described device can't hold.
    key: Any = jax.eval_shape(lambda: jax.random.key(config.seed))
    with jax.set_mesh(mesh):
        state = abstract_state(
            params, optimizer, key, frozen, average=config.training.ema_decay is not None
        )
    return Assembly(
        networks=networks,
        abstract_state=state,
        abstract_batch=_abstract_batch(config, mesh),
        train_step=make_train_step(
            networks,
            objective,
            optimizer,
            schedule,
            config.training,
            gradient_dtype=config.execution.compute_dtype,
        ),
        eval_step=make_eval_step(networks, objective),
        optimizer=optimizer,
        schedule=schedule,
        objective=objective,
    )


def _abstract_batch(config: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    # Refuses a batch that doesn't divide.
    host_rows(mesh, config.data.batch_size, list(mesh.devices.flat))
    return {
        name: jax.ShapeDtypeStruct(field.shape, field.dtype, sharding=field_sharding(name, mesh))
        for name, field in stored_fields(config).items()
    }


def checked_attention(config: RunConfig) -> str:
    """Which backend attention gets on the current mesh, in a line to print.

    Raises:
      ConfigError: it can't run here, or computes wrongly.
    """
    model, execution = config.model, config.execution
    return choose_and_check(
        backend=execution.attention,
        context=execution.context_attention,
        dtype=execution.compute_dtype,
        rows=config.data.batch_size // config.training.microbatches,
        length=config.data.seq_len,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        check=execution.check_attention,
    )


def stored_fields(config: RunConfig) -> dict[str, Field]:
    """The arrays of a run's batches, with what other models said and is stored beside the data."""
    objective = config.objective
    top_k = objective.stored_tokens if isinstance(objective, DistillConfig) else 0
    return batch_fields(config.data, reference_logps=needs_reference(config), teacher_top_k=top_k)


def needs_reference(config: RunConfig) -> bool:
    """Whether a run's batches carry log-probabilities under the model that it starts from."""
    objective = config.objective
    return isinstance(objective, DPOConfig) and objective.reference_source == "cached"
