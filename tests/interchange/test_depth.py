"""A checkpoint with some of its layers left out."""

import dataclasses

import numpy as np
import pytest
from in_memory import CONFIG, random_source

from llama_jax.config.loading import ConfigError
from llama_jax.config.post_training import InitConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.depth import WithLayers
from llama_jax.interchange.starting import load_params_into
from llama_jax.interchange.tensors import InterchangeError
from llama_jax.sharding.mesh import make_mesh

DEEP = dataclasses.replace(CONFIG, num_layers=4)


def test_the_chosen_layers_follow_each_other_and_the_rest_is_as_it_was():
    whole = random_source(DEEP)
    pruned = WithLayers(whole, (1, 3))
    assert pruned.config == dataclasses.replace(DEEP, num_layers=2)
    for name in ("attention.q_proj", "mlp.down_proj", "attn_norm.scale"):
        for new, old in ((0, 1), (1, 3)):
            found = pruned.tensors[f"layers.{new}.{name}"]
            assert found.name == f"layers.{new}.{name}"
            np.testing.assert_array_equal(found.read_all(), whole.arrays[f"layers.{old}.{name}"])
    assert len(pruned.tensors) == len(whole.tensors) - 2 * 9
    np.testing.assert_array_equal(pruned.tensors["embedding"].read_all(), whole.arrays["embedding"])
    assert pruned.stored_name("layers.1.mlp.up_proj") == "layers.3.mlp.up_proj"


def test_a_model_of_half_the_depth_computes_with_those_layers():
    whole = random_source(DEEP)
    execution = ExecutionConfig(compute_dtype="float32")
    mesh = make_mesh(MeshConfig(), None)
    config = dataclasses.replace(DEEP, num_layers=2)
    start = load_params_into(WithLayers(whole, (0, 2)), config, execution, mesh)
    stacked_LFD = np.asarray(start.model.layers.mlp.down_proj[...])
    for new, old in ((0, 0), (1, 2)):
        np.testing.assert_array_equal(
            stacked_LFD[new].T, whole.arrays[f"layers.{old}.mlp.down_proj"]
        )


def test_a_layer_that_isnt_there_and_a_checkpoint_at_fault_are_refused():
    with pytest.raises(ConfigError, match=r"init\.layers: layer 4, but arrays has 4"):
        WithLayers(random_source(DEEP), (0, 4))
    broken = random_source(DEEP)
    del broken.arrays["layers.2.mlp.up_proj"]
    # Of a layer that isn't even taken: the file is not what it says.
    with pytest.raises(InterchangeError, match=r"layers\.2\.mlp\.up_proj"):
        WithLayers(broken, (0, 1))


@pytest.mark.parametrize("layers", [(), (-1, 2), (2, 1), (1, 1)])
def test_layers_are_told_once_and_in_order(layers):
    with pytest.raises(ConfigError, match="layers: numbers of layers from 0"):
        InitConfig(path="x", layers=layers)
