"""How a step makes models of parameters: the one that is trained, and those that it only reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from llama_jax.config.run import DistillConfig, ExecutionConfig, RunConfig
from llama_jax.interchange.opening import open_source
from llama_jax.models.init import abstract_model
from llama_jax.models.lora import split_params
from llama_jax.objectives.objective import Objective

# Of `TrainState.frozen`: the weights under an adapter.
BASE = "base"
# The model that a run starts from, kept as it was.
REFERENCE = "reference"
TEACHER = "teacher"


@dataclasses.dataclass(frozen=True)
class Networks:
    """The graphs of a run's models.

    Attributes:
      graphdef: of the model that is trained, with its adapters.
      others: of each model that is only read, by name, its graph and whose parameters of
        `TrainState.frozen` it has: its own, or those of `BASE`.
    """

    graphdef: nnx.GraphDef
    others: Mapping[str, tuple[nnx.GraphDef, str]] = dataclasses.field(default_factory=dict)

    def model(self, params: Any, frozen: Mapping[str, Any]) -> Any:
        """The model that is trained."""
        base = (frozen[BASE],) if BASE in frozen else ()
        return nnx.merge(self.graphdef, params, *base)

    def read_only(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """The other models by name."""
        return {
            name: nnx.merge(graphdef, frozen[params])
            for name, (graphdef, params) in self.others.items()
        }


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

    What is only read lies in the compute dtype. Under adapters the base is the reference too.

    Raises:
      ConfigError: the mesh doesn't divide a parameter.
      InterchangeError: a teacher's checkpoint that can't be opened.
    """
    model, adapter, stored = config.model, config.adapter, stored_as(config)
    read = dataclasses.replace(stored, param_dtype=stored.compute_dtype)
    frozen: dict[str, nnx.State] = {}
    graphdef, params = abstract_model(model, stored, mesh, adapter)
    if adapter is not None:
        params, frozen[BASE] = split_params(params)
    others: dict[str, tuple[nnx.GraphDef, str]] = {}
    if REFERENCE in objective.frozen:
        reference, state = abstract_model(model, read, mesh)
        others[REFERENCE] = (reference, REFERENCE if adapter is None else BASE)
        if adapter is None:
            frozen[REFERENCE] = state
    if TEACHER in objective.frozen:
        assert isinstance(config.objective, DistillConfig)
        architecture = open_source(config.objective.path).config
        teacher, frozen[TEACHER] = abstract_model(architecture, read, mesh)
        others[TEACHER] = (teacher, TEACHER)
    return Networks(graphdef, others), params, frozen
