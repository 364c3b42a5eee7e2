"""What a run starts from: weights of a checkpoint or drawn ones, and those that it only reads."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from llama_jax.config.post_training import InitConfig
from llama_jax.config.run import RunConfig
from llama_jax.interchange.depth import WithLayers
from llama_jax.interchange.opening import open_adapter, open_source
from llama_jax.interchange.starting import load_params_into
from llama_jax.models.init import make_model
from llama_jax.models.llama import Llama
from llama_jax.models.lora import split_params
from llama_jax.tokenizers import Tokenizer
from llama_jax.training.assembly import Assembly
from llama_jax.training.inputs import Say
from llama_jax.training.networks import BASE, REFERENCE, TEACHER, stored_as
from llama_jax.training.teacher import load_teacher


def starting_params(
    config: RunConfig, assembly: Assembly, tokenizer: Tokenizer, mesh: Mesh, say: Say
) -> tuple[nnx.State, dict[str, nnx.State]]:
    """What a step changes at step 0, and `TrainState.frozen`.

    Raises:
      ConfigError, InterchangeError: a checkpoint that can't be used, one line.
    """
    params = nnx.state(_starting_model(config, tokenizer, mesh, say))
    frozen: dict[str, Any] = {}
    wanted = assembly.abstract_state.frozen
    if BASE in wanted:
        params, frozen[BASE] = split_params(params)
    if REFERENCE in wanted:
        # Copied even where the dtype is the same: a step is given its state's buffers for good.
        frozen[REFERENCE] = jax.tree.map(
            lambda value, like: jnp.array(value, like.dtype, copy=True), params, wanted[REFERENCE]
        )
    if TEACHER in wanted:
        frozen[TEACHER] = nnx.state(load_teacher(config, mesh))
    return params, frozen


def _starting_model(config: RunConfig, tokenizer: Tokenizer, mesh: Mesh, say: Say) -> Llama:
    execution = stored_as(config)
    if config.init is None:
        return make_model(config.model, execution, mesh, config.seed, config.adapter)
    trained = None if config.init.adapter is None else open_adapter(config.init.adapter)
    source = open_source(config.init.path)
    if config.init.layers is not None:
        source = WithLayers(source, config.init.layers)
    start = load_params_into(
        source,
        config.model,
        execution,
        mesh,
        adapter=config.adapter,
        trained=trained,
        seed=config.seed,
        tokenizer=tokenizer,
        special_rows=config.init.special_rows,
    )
    say(f"starting from {config.init.path}{_chosen_layers(config.init)}")
    for note in start.notes:
        say(note)
    return start.model


def _chosen_layers(init: InitConfig) -> str:
    return "" if init.layers is None else f", layers {', '.join(map(str, init.layers))} of it"
