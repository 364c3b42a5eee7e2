"""The weights that a run starts from: a checkpoint's own, and fresh ones for what the run adds."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from in_memory import CONFIG, random_source

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import Llama3Scaling, RopeConfig
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.orbax import write_orbax
from llama_jax.interchange.starting import load_params_into
from llama_jax.models.init import abstract_model, make_model
from llama_jax.models.lora import split_params
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers.byte import ByteTokenizer

F32 = ExecutionConfig(compute_dtype="float32")
SCALAR = dataclasses.replace(CONFIG, head="scalar")
LORA = AdapterConfig(rank=2, alpha=4.0)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def arrays(model):
    return {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def assert_same(ours, theirs):
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_a_run_of_the_same_model_gets_the_checkpoints_weights_and_nothing_else():
    start = load_params_into(random_source(), CONFIG, F32, one_device())
    wanted = arrays(load_model(random_source(), F32, one_device()))
    assert arrays(start.model).keys() == wanted.keys()
    assert_same(arrays(start.model), wanted)
    assert start.notes == ()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, tensor=2)], ids=["one", "four"])
def test_adapters_are_those_of_the_seed_beside_the_checkpoints_weights(dora, mesh):
    adapter = dataclasses.replace(LORA, dora=dora)
    mesh = make_mesh(mesh, jax.devices()[: 1 if mesh == MeshConfig() else 4])
    start = load_params_into(random_source(), CONFIG, F32, mesh, adapter=adapter, seed=3)
    found = arrays(start.model)
    assert_same(found, arrays(load_model(random_source(), F32, one_device())))
    drawn = arrays(make_model(CONFIG, F32, one_device(), 3, adapter))
    assert_same(found, {name: array for name, array in drawn.items() if "_lora_" in name})
    assert found.keys() == drawn.keys()
    if dora:
        up = found["layers.mlp.up_proj"]
        norms = np.sqrt((up**2).sum(1))
        np.testing.assert_allclose(found["layers.mlp.up_proj_dora_scale"], norms, rtol=1e-6)
    assert len(start.notes) == 1
    assert start.notes[0].startswith(f"{'DoRA' if dora else 'LoRA'} adapters of rank 2: 0.0")
    graphdef, abstract = abstract_model(CONFIG, F32, mesh, adapter)
    assert nnx.split(start.model)[0] == graphdef
    for path, leaf in nnx.to_flat_state(abstract):
        array = dict(nnx.to_flat_state(nnx.state(start.model)))[path][...]
        assert (array.sharding, array.dtype) == (leaf.get_value().sharding, leaf.dtype), path
    trainable, frozen = split_params(nnx.state(start.model))
    assert len(nnx.to_flat_state(trainable)) == 7 * (3 if dora else 2)
    assert len(nnx.to_flat_state(frozen)) == 12


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_takes_the_backbone_and_draws_its_head(tied):
    source = random_source(dataclasses.replace(CONFIG, tie_embeddings=tied))
    start = load_params_into(source, SCALAR, F32, one_device(), seed=5)
    found, backbone = arrays(start.model), arrays(load_model(source, F32, one_device()))
    backbone.pop("lm_head", None)
    assert found.keys() == backbone.keys() | {"reward_head"}
    assert_same(found, backbone)
    drawn = make_model(SCALAR, F32, one_device(), 5).reward_head[...]
    np.testing.assert_array_equal(found["reward_head"], drawn)
    (note,) = start.notes
    assert note.startswith("the reward head is new, drawn from the run's seed; arrays has a vocab")


def test_a_reward_model_goes_on_from_one_with_its_head():
    source = random_source(SCALAR)
    start = load_params_into(source, SCALAR, F32, one_device())
    np.testing.assert_array_equal(arrays(start.model)["reward_head"], source.arrays["reward_head"])
    assert start.notes == ()
    with pytest.raises(ConfigError, match=r"model\.head: 'vocab', but arrays is a reward model"):
        load_params_into(source, CONFIG, F32, one_device())


LONGER = RopeConfig(theta=10000.0, scaling=Llama3Scaling(factor=8.0, original_max_seq_len=64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_dim": 128}, "model.mlp_dim: 128, but 96 in arrays"),
        ({"num_layers": 3}, "model.num_layers: 3, but 2 in arrays"),
        ({"tie_embeddings": True}, "model.tie_embeddings: True, but False in arrays"),
        ({"norm_eps": 1e-6}, "model.norm_eps: 1e-06, but 1e-05 in arrays"),
        ({"rope": LONGER}, "model.rope.scaling.factor: 8.0, but 4.0 in arrays"),
        ({"rope": RopeConfig(10000.0)}, "model.rope.scaling: none, but 'llama3' in arrays"),
        ({"rope": RopeConfig(5e5, CONFIG.rope.scaling)}, "model.rope.theta: 500000.0, but 10000.0"),
    ],
)
def test_another_architecture_is_refused_by_its_field(changes, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ConfigError) as caught:
        load_params_into(random_source(), config, F32, one_device())
    assert str(caught.value).startswith(message)


def test_lengths_initial_spreads_and_rounded_epsilons_may_differ():
    source = random_source(dataclasses.replace(CONFIG, norm_eps=float(np.float32(1e-5))))
    shorter = dataclasses.replace(CONFIG, max_seq_len=16, init_std=0.5)
    assert load_params_into(source, shorter, F32, one_device()).notes == ()
    longer = dataclasses.replace(CONFIG, max_seq_len=256)
    (note,) = load_params_into(source, longer, F32, one_device()).notes
    assert note == "model.max_seq_len 256 is over the 64 of arrays: longer rows are new to it"


def test_checkpoints_that_restore_at_once_do_so_and_take_new_rows(tmp_path):
    source = random_source()
    tokenizer = ByteTokenizer()
    new = max(tokenizer.special.values())
    source.arrays["embedding"][new] = 0
    write_orbax(source, tmp_path, tokenizer=tokenizer)
    options = {"adapter": LORA, "tokenizer": tokenizer}
    kept, started = (
        load_params_into(
            open_source(tmp_path), CONFIG, F32, one_device(), special_rows=wish, **options
        )
        for wish in ("keep", "mean")
    )
    assert_same(arrays(kept.model), arrays(load_model(source, F32, one_device())))
    changed = {
        n for n, a in arrays(started.model).items() if not np.array_equal(a, arrays(kept.model)[n])
    }
    assert changed == {"embedding"}
    rows = arrays(started.model)["embedding"]
    assert np.abs(rows[new]).max() > 0
    assert_same(
        {"embedding": np.delete(rows, new, 0)},
        {"embedding": np.delete(source.arrays["embedding"], new, 0)},
    )
    assert "(near zero): kept; init.special_rows = 'mean' starts them" in kept.notes[0]
    assert "(near zero): started at the mean of the others" in started.notes[0]


def test_new_rows_need_a_tokenizer():
    with pytest.raises(ConfigError, match=r"init\.special_rows: needs a tokenizer"):
        load_params_into(random_source(), CONFIG, F32, one_device(), special_rows="mean")
