"""Reward models: their head in every format, their rewards, and where they are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from in_memory import CONFIG, ArraySource, assert_bit_equal, logits, random_source

from llama_jax.config.loading import ConfigError
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.inference.generator import Generator
from llama_jax.inference.sessions import open_session
from llama_jax.interchange.converting import convert
from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.orbax import write_orbax
from llama_jax.interchange.safetensors_reading import read_header
from llama_jax.interchange.tensors import InterchangeError, canonical_shapes
from llama_jax.models import accounting
from llama_jax.models.init import make_model
from llama_jax.models.llama import Llama
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers.byte import ByteTokenizer

F32 = ExecutionConfig(compute_dtype="float32")
SCALAR = dataclasses.replace(CONFIG, head="scalar")
IDS = np.random.default_rng(1).integers(0, 288, 12)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model as transformers writes one."""
    folder = tmp_path_factory.mktemp("reward")
    write_hugging_face(random_source(SCALAR), folder, tokenizer=ByteTokenizer())
    return folder


def test_a_reward_model_has_a_vector_where_others_have_a_head():
    shapes = canonical_shapes(SCALAR)
    assert shapes["reward_head"] == (64,)
    assert shapes.keys() == canonical_shapes(CONFIG).keys() - {"lm_head"} | {"reward_head"}
    # A tied head is none of a reward model's either.
    assert canonical_shapes(dataclasses.replace(SCALAR, tie_embeddings=True)) == shapes


def test_parameters_and_flops_count_the_vector_for_the_matrix():
    count, flops = accounting.param_count, accounting.flops_per_token
    assert count(CONFIG) - count(SCALAR) == 288 * 64 - 64
    assert flops(CONFIG, 32) - flops(SCALAR, 32) == 6 * 64 * (288 - 1)
    adapter = AdapterConfig(rank=2, targets=("q_proj",))
    factors = 2 * 2 * (64 + 64)
    assert accounting.trainable_param_count(SCALAR, adapter) == factors + 64
    matmul = accounting.matmul_params(SCALAR)
    attention = flops(SCALAR, 32) - 6 * matmul
    # The head is trained with the adapters, the weights aren't.
    assert flops(SCALAR, 32, adapter) == 4 * matmul + 2 * 64 + 6 * factors + attention


def test_rewards_are_products_with_the_head_in_float32():
    model = load_model(random_source(SCALAR), F32, one_device())
    x_BTD = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)
    head_D = random_source(SCALAR).arrays["reward_head"]
    low_BTD = jnp.asarray(x_BTD, jnp.bfloat16)
    with jax.set_mesh(one_device()):
        rewards_BT, low_BT = model.rewards(jnp.asarray(x_BTD)), model.rewards(low_BTD)
    np.testing.assert_allclose(np.asarray(rewards_BT), x_BTD @ head_D, rtol=1e-5, atol=1e-5)
    assert low_BT.dtype == jnp.float32
    wanted = np.asarray(low_BTD.astype(jnp.float32)) @ head_D
    np.testing.assert_allclose(np.asarray(low_BT), wanted, rtol=1e-5, atol=1e-5)


def test_rewards_on_a_mesh_are_those_of_one_device():
    wanted_T = logits(random_source(SCALAR), IDS)
    assert wanted_T.shape == (12,)
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    graphdef, params = nnx.split(load_model(random_source(SCALAR), F32, mesh))
    ids_BT = np.stack([IDS, IDS]).astype(np.int32)

    @jax.jit
    def run(params):
        places_BT = jnp.broadcast_to(jnp.arange(12), ids_BT.shape)
        ones_BT = jnp.ones_like(places_BT)
        model = nnx.merge(graphdef, params)
        return model(ids_BT, positions_BT=places_BT, segment_ids_BT=ones_BT)

    with jax.set_mesh(mesh):
        np.testing.assert_allclose(np.asarray(run(params))[1], wanted_T, atol=2e-5)


def test_a_fresh_head_has_the_spread_of_its_width():
    wide = dataclasses.replace(SCALAR, embed_dim=4096, mlp_dim=8, num_layers=1)
    head = nnx.eval_shape(lambda: Llama(wide, F32, rngs=nnx.Rngs(0))).reward_head
    assert (head.shape, head.dtype) == ((4096,), jnp.float32)
    low = dataclasses.replace(F32, param_dtype="bfloat16")
    small = dataclasses.replace(SCALAR, vocab_size=8, embed_dim=2048, mlp_dim=8, num_layers=1)
    values = np.asarray(make_model(small, low, one_device(), 0).reward_head[...])
    assert values.dtype == np.float32
    assert values.std() == pytest.approx(1 / np.sqrt(2049), rel=0.05)


def test_transformers_form_is_a_classifier_of_one_label(folder):
    table = json.loads((folder / "config.json").read_text())
    assert table["architectures"] == ["LlamaForSequenceClassification"]
    assert (table["id2label"], table["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
    entries = read_header(folder / "model.safetensors")
    assert entries["score.weight"].shape == (1, 64)
    assert "lm_head.weight" not in entries
    back = open_source(folder)
    assert (back.config, back.format) == (SCALAR, "hf")
    assert_bit_equal(random_source(SCALAR), back)


def test_orbax_folders_hold_one_bit_by_bit(tmp_path):
    write_orbax(random_source(SCALAR), tmp_path, tokenizer=ByteTokenizer())
    back = open_source(tmp_path)
    assert back.config == SCALAR
    assert_bit_equal(random_source(SCALAR), back)


def test_convert_compares_rewards(folder, tmp_path):
    report = convert(folder, tmp_path / "orbax", "orbax")
    assert report.exact
    assert report.comparison.max_difference == 0
    assert report.comparison.largest_logit > 0.1


@pytest.mark.parametrize("to", ["gguf", "meta"])
def test_formats_without_reward_models_refuse_them(to, folder, tmp_path):
    with pytest.raises(ConfigError, match=f"--to: {to} has no reward models; hf and orbax have"):
        convert(folder, tmp_path / "x.gguf" if to == "gguf" else tmp_path / "x", to)


def test_generating_with_one_is_refused_before_its_weights_are_read(folder):
    with pytest.raises(ConfigError, match="a reward model scores text, it doesn't generate"):
        open_session(str(folder), chat=False)
    mesh = one_device()
    model = load_model(random_source(SCALAR), F32, mesh)
    with pytest.raises(ConfigError, match=r"model\.head: a reward model scores text"):
        Generator(model, ByteTokenizer(), mesh)


def test_a_head_is_asked_for_what_it_gives():
    mesh = one_device()
    reward, vocab = (load_model(random_source(c), F32, mesh) for c in (SCALAR, CONFIG))
    x_BTD = jnp.zeros((1, 2, 64))
    for call in (reward.logits, reward.for_loss):
        with pytest.raises(ConfigError, match=r"model\.head: a reward model \('scalar'\) gives no"):
            call(x_BTD)
    with pytest.raises(ConfigError, match=r"model\.head: 'vocab' gives no rewards"):
        vocab.rewards(x_BTD)


def test_a_missing_or_misplaced_head_is_told_by_its_name():
    arrays = dict(random_source(SCALAR).arrays)
    del arrays["reward_head"]
    with pytest.raises(InterchangeError, match="tensor reward_head is missing"):
        load_model(ArraySource(SCALAR, arrays), F32, one_device())
    arrays = random_source(SCALAR).arrays | {"lm_head": random_source().arrays["lm_head"]}
    with pytest.raises(InterchangeError, match="lm_head has no place in the model"):
        load_model(ArraySource(SCALAR, arrays), F32, one_device())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_transformers_gives_the_same_scores_both_ways(folder, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = transformers.LlamaForSequenceClassification

    def scores(model):
        """Of three rows of their own lengths, padded on the right."""
        rows = [IDS[:5], IDS, IDS[3:10]]
        ids_BT = np.full((3, 12), 260)
        for row, ids in zip(ids_BT, rows, strict=True):
            row[: len(ids)] = ids
        with torch.no_grad():
            logits = model(torch.from_numpy(ids_BT), attention_mask=torch.from_numpy(ids_BT != 260))
        return [float(score) for score in logits.logits[:, 0]], rows

    theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.config.pad_token_id = 260
    found, rows = scores(theirs)
    ours = [float(logits(open_source(folder), ids)[-1]) for ids in rows]
    np.testing.assert_allclose(ours, found, atol=2e-5)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs.score.weight.copy_(torch.randn_like(theirs.score.weight))
    theirs.save_pretrained(tmp_path)
    back = open_source(tmp_path)
    assert back.config == dataclasses.replace(SCALAR, init_std=back.config.init_std)
    ours = [float(logits(back, ids)[-1]) for ids in rows]
    np.testing.assert_allclose(ours, scores(theirs)[0], atol=2e-5)
