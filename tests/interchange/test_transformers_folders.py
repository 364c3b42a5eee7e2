"""Folders that transformers writes, read by us; folders that we write, loaded by transformers.

Logits within 2e-5 in float32, greedy continuations equal, state dicts equal bit by bit.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import F32, config_table
from tiny_models import forward as forward_of

from llama_jax.config.model import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)
from llama_jax.config.run import MeshConfig
from llama_jax.interchange.converting import convert
from llama_jax.interchange.hugging_face_config import to_config_json
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.opening import open_source
from llama_jax.sharding.mesh import make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# transformers' own warnings.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

LOGITS = 2e-5
LENGTH, CONTINUED = 40, 12
BASE = ModelConfig(
    vocab_size=96,
    embed_dim=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=6,
    head_dim=8,
    mlp_dim=80,
    max_seq_len=128,
    norm_eps=1e-5,
    rope=RopeConfig(10000.0),
    tie_embeddings=False,
    init_std=0.12,
)
LLAMA3 = RopeConfig(5e5, Llama3Scaling(factor=8.0, original_max_seq_len=32))
KINDS = {
    "llama 1 and 2": dataclasses.replace(BASE, norm_eps=1e-6),
    "code llama": dataclasses.replace(BASE, rope=RopeConfig(1e6), num_kv_heads=2),
    "llama 3": dataclasses.replace(BASE, num_kv_heads=2, rope=RopeConfig(5e5)),
    "llama 3.1": dataclasses.replace(BASE, num_kv_heads=2, rope=LLAMA3),
    "llama 3.2": dataclasses.replace(BASE, num_kv_heads=3, rope=LLAMA3, tie_embeddings=True),
    "smollm2": dataclasses.replace(BASE, num_kv_heads=2, tie_embeddings=True),
    "one kv head": dataclasses.replace(BASE, num_kv_heads=1),
    "head_dim": dataclasses.replace(BASE, num_heads=4, num_kv_heads=2, head_dim=20),
    "attention bias": dataclasses.replace(BASE, attention_bias=True, num_kv_heads=2),
    "mlp bias": dataclasses.replace(BASE, mlp_bias=True),
    "linear": dataclasses.replace(BASE, rope=RopeConfig(1e4, LinearScaling(factor=4.0))),
    "yarn": dataclasses.replace(BASE, rope=RopeConfig(1e4, YarnScaling(4.0, 32))),
    "yarn, own figures": dataclasses.replace(
        BASE,
        rope=RopeConfig(
            1e2, YarnScaling(2.0, 64, beta_fast=3.0, beta_slow=0.3, attention_factor=1.2)
        ),
    ),
}


def their_model(config, seed=0):
    """A random model of transformers; biases and norms random too, which it starts at 0 and 1."""
    torch.manual_seed(seed)
    table = config_table(config, "new")
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**table)).float().eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(0.3 * torch.randn_like(value))
    return made


def their_logits(model, ids_BT):
    with torch.no_grad():
        return model(torch.from_numpy(ids_BT).long()).logits.float().numpy()


def our_run(folder):
    """Our logits of tokens [B, T], compiled once a shape."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    graphdef, params = nnx.split(load_model(open_source(folder), F32, mesh))

    @jax.jit
    def forward(params, batch):
        return forward_of(nnx.merge(graphdef, params), batch)

    def run(ids_BT):
        places_BT = np.broadcast_to(np.arange(ids_BT.shape[1], dtype=np.int32), ids_BT.shape)
        ones_BT = np.ones_like(ids_BT)
        with jax.set_mesh(mesh):
            batch = {"tokens": ids_BT, "positions": places_BT, "segment_ids": ones_BT}
            return np.asarray(forward(params, batch))

    return run


def greedy(run, ids_BT):
    """CONTINUED tokens by full forwards over rows of one length, padded on the right."""
    rows_BT = np.pad(ids_BT, ((0, 0), (0, CONTINUED)))
    for at in range(ids_BT.shape[1], rows_BT.shape[1]):
        rows_BT[:, at] = run(rows_BT)[:, at - 1].argmax(-1)
    return rows_BT[:, ids_BT.shape[1] :]


def assert_same(folder, theirs, config):
    ids_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH)).astype(np.int32)
    wanted_BTV = their_logits(theirs, ids_BT)
    run = our_run(folder)
    assert wanted_BTV.std() > 0.5
    np.testing.assert_allclose(run(ids_BT), wanted_BTV, atol=LOGITS)
    np.testing.assert_array_equal(
        greedy(run, ids_BT), greedy(lambda ids: their_logits(theirs, ids), ids_BT)
    )


def assert_equal_states(folder, theirs):
    """transformers loads our folder as it is, with nothing missing and nothing left over."""
    loaded, about = transformers.LlamaForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted, found = theirs.state_dict(), loaded.state_dict()
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))
    return loaded


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_of_transformers_is_the_same_model_and_goes_back_as_it_was(name, tmp_path):
    config = KINDS[name]
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path / "theirs")
    assert open_source(tmp_path / "theirs").config == config
    assert_same(tmp_path / "theirs", theirs, config)
    report = convert(tmp_path / "theirs", tmp_path / "ours", "hf", tokenizer=False)
    assert report.exact
    loaded = assert_equal_states(tmp_path / "ours", theirs)
    assert loaded.config.rope_parameters.items() >= theirs.config.rope_parameters.items()
    ids_BT = np.arange(LENGTH, dtype=np.int32)[None]
    np.testing.assert_array_equal(their_logits(loaded, ids_BT), their_logits(theirs, ids_BT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_stay_what_they_are(dtype, tmp_path):
    theirs = their_model(KINDS["llama 3.2"]).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    assert convert(tmp_path / "theirs", tmp_path / "ours", "hf", tokenizer=False).exact
    loaded = assert_equal_states(tmp_path / "ours", theirs)
    assert loaded.config.dtype == dtype
    ids_BT = np.arange(LENGTH, dtype=np.int32)[None]
    found_BTV = our_run(tmp_path / "theirs")(ids_BT)
    # Read anew: casting a model to bfloat16 and back rounds transformers' rotary table too.
    wide = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    np.testing.assert_allclose(found_BTV, their_logits(wide, ids_BT), atol=LOGITS)


def test_sharded_folders_go_both_ways(tmp_path):
    config = KINDS["llama 3.1"]
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    assert_same(tmp_path / "theirs", theirs, config)
    convert(tmp_path / "theirs", tmp_path / "ours", "hf", shard_size=40_000, tokenizer=False)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 5
    assert_equal_states(tmp_path / "ours", theirs)


@pytest.mark.parametrize("style", ["old", "oldest"])
@pytest.mark.parametrize("name", ["llama 3.1", "linear", "yarn", "head_dim"])
def test_configs_of_older_releases_are_the_same_model(name, style, tmp_path):
    config = KINDS[name]
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_table(config, style)))
    # transformers itself reads the rewritten one as the same model.
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    ids_BT = np.arange(LENGTH, dtype=np.int32)[None]
    np.testing.assert_array_equal(their_logits(again, ids_BT), their_logits(theirs, ids_BT))
    assert_same(tmp_path, theirs, config)


def test_every_key_of_our_config_is_one_that_transformers_knows():
    known = set(transformers.LlamaConfig().to_dict()) | {"architectures", "dtype"}
    older = {"rope_theta", "rope_scaling", "torch_dtype"}
    assert set(to_config_json(BASE, "float32")) <= known | older


def test_generation_config_is_read_by_transformers(tmp_path):
    theirs = their_model(KINDS["smollm2"])
    theirs.generation_config.eos_token_id = [2, 5]
    theirs.generation_config.do_sample = True
    theirs.generation_config.temperature, theirs.generation_config.top_p = 0.6, 0.9
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", "hf", tokenizer=False)
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
    assert (found.eos_token_id, found.bos_token_id) == ([2, 5], 1)
    assert (found.do_sample, found.temperature, found.top_p) == (True, 0.6, 0.9)
