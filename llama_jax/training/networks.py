"""How a step makes models of parameters: the one that is trained, and those that it only reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import DistillConfig, ExecutionConfig, RunConfig
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.source import Source
from llama_jax.models.init import abstract_model
from llama_jax.models.lora import split_params
from llama_jax.objectives.objective import Objective

# Of `TrainState.frozen`: the weights under an adapter.
BASE = "base"
# The model that a run starts from, kept as it was.
REFERENCE = "reference"
TEACHER = "teacher"
# A graph, and the parts of `TrainState.frozen` that are its parameters.
ReadOnly = tuple[nnx.GraphDef, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The graphs of a run's models.

    Attributes:
      graphdef: of the model that is trained, with its adapters.
      others: each model that is only read, by name; its parameters are its own, those of `BASE`,
        or both.
    """

    graphdef: nnx.GraphDef
    others: Mapping[str, ReadOnly] = dataclasses.field(default_factory=dict)

    def model(self, params: Any, frozen: Mapping[str, Any]) -> Any:
        """The model that is trained."""
        base = (frozen[BASE],) if BASE in frozen else ()
        return nnx.merge(self.graphdef, params, *base)

    def read_only(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """The other models by name."""
        return {
            name: nnx.merge(graphdef, *(frozen[part] for part in parts))
            for name, (graphdef, parts) in self.others.items()
        }


def open_teacher(config: DistillConfig) -> Source:
    """The checkpoint of the teacher.

    Raises:
      ConfigError: a reward model.
      InterchangeError: it can't be opened.
    """
    source = open_source(config.path)
    if source.config.head != "vocab":
        raise ConfigError(
            f"{source.path} is a reward model, which has no next tokens to teach",
            key="objective.path",
        )
    return source


def stored_as(config: RunConfig) -> ExecutionConfig:
    """How the weights that a run starts from lie: those under adapters in the compute dtype."""
    execution = config.execution
    if config.adapter is None:
        return execution
    return dataclasses.replace(execution, param_dtype=execution.compute_dtype)


def abstract_networks(
    config: RunConfig, objective: Objective, mesh: Mesh
) -> tuple[Networks, nnx.State, dict[str, nnx.State]]:
    """A run's models as shapes: the graphs, what a step changes, and what it only reads.

    What is only read lies in the compute dtype. Under adapters the base is the reference too, with
    a copy of the adapter that the run goes on with if there is one.

    Raises:
      ConfigError: the mesh doesn't divide a parameter.
      InterchangeError: a teacher's checkpoint that can't be opened, ConfigError a reward model's.
    """
    model, adapter, stored = config.model, config.adapter, stored_as(config)
    read = dataclasses.replace(stored, param_dtype=stored.compute_dtype)
    frozen: dict[str, nnx.State] = {}
    graphdef, params = abstract_model(model, stored, mesh, adapter)
    if adapter is not None:
        params, frozen[BASE] = split_params(params)
    others: dict[str, ReadOnly] = {}
    if REFERENCE in objective.frozen:
        if config.init is not None and config.init.adapter is not None:
            others[REFERENCE] = (graphdef, (REFERENCE, BASE))
            frozen[REFERENCE] = params
        else:
            reference, state = abstract_model(model, read, mesh)
            others[REFERENCE] = (reference, (REFERENCE if adapter is None else BASE,))
            if adapter is None:
                frozen[REFERENCE] = state
    if TEACHER in objective.frozen:
        assert isinstance(config.objective, DistillConfig)
        architecture = open_teacher(config.objective).config
        teacher, frozen[TEACHER] = abstract_model(architecture, read, mesh)
        others[TEACHER] = (teacher, (TEACHER,))
    return Networks(graphdef, others), params, frozen
