"""What a step is assembled of is what a run's arrays are, without any of them."""

import dataclasses

import jax
import pytest
from flax import nnx
from tiny_llama import make_batch

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig
from llama_jax.data.device import to_device
from llama_jax.models.init import make_model
from llama_jax.sharding.mesh import make_mesh
from llama_jax.training.assembly import assemble
from llama_jax.training.state import init_state

pytestmark = pytest.mark.short
CONFIG = dataclasses.replace(
    load_run_config("tiny", ["data.seq_len=16"]), mesh=MeshConfig(fsdp=4, tensor=2)
)


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


def test_the_abstract_state_and_batch_are_those_of_a_run_and_compile_once():
    mesh = make_mesh(CONFIG.mesh)
    assembly = assemble(CONFIG, mesh)
    with jax.set_mesh(mesh):
        params = nnx.state(make_model(CONFIG.model, CONFIG.execution, mesh, CONFIG.seed))
        state = init_state(params, assembly.optimizer, jax.random.key(CONFIG.seed))
        batch = to_device(make_batch(0), mesh)
        assert types(state) == types(assembly.abstract_state)
        assert types(batch) == types(assembly.abstract_batch)
        assembly.train_step.lower(assembly.abstract_state, assembly.abstract_batch)
        state, metrics = assembly.train_step(state, batch)
    assert assembly.train_step.compilations == 1
    assert int(state.step) == 1
    assert float(metrics["tokens"]) > 0


def test_a_batch_that_does_not_divide_is_told_with_one_that_does():
    with pytest.raises(ConfigError, match=r"data\.batch_size: 6 rows don't divide over the 4"):
        assemble(
            dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=6)),
            make_mesh(CONFIG.mesh),
        )
