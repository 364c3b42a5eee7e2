"""A run's own checkpoints, and the folders that `--to orbax` makes, as sources."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from in_memory import assert_bit_equal, random_source
from tiny_checkpoints import CASES, F32, logits, params_of, reference_batch

from llama_jax.checkpoint.manager import Checkpoints
from llama_jax.config.files import load_run_config
from llama_jax.config.loading import to_table, to_toml
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.opening import open_source, recognise
from llama_jax.interchange.orbax import write_orbax
from llama_jax.interchange.run_checkpoint import RunSource
from llama_jax.interchange.tensors import BFLOAT16, InterchangeError
from llama_jax.models.init import abstract_model
from llama_jax.optim.optimizer import make_optimizer
from llama_jax.optim.schedule import make_schedule
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.hugging_face_json import HuggingFaceTokenizer
from llama_jax.training.state import init_state

# A restore that fails leaves Orbax's event loop with work that Python reports when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = CASES["biased_yarn"]
MESHES = [MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=1, tensor=8)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with steps 2 and 5, written from a mesh of 2 x 4, and the params of 5."""
    folder = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(load_run_config("tiny"), model=CONFIG)
    (folder / "config.toml").write_text(to_toml(to_table(config)))
    ByteTokenizer().save(folder / "tokenizer")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    schedule = make_schedule(config.schedule, config.training.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    model = load_model(random_source(CONFIG), F32, mesh)
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints, jax.set_mesh(mesh):
        state = init_state(nnx.state(model), optimizer, jax.random.key(0))
        checkpoints.save(5, state, {})
    shutil.copytree(folder / "checkpoints" / "step_5", folder / "checkpoints" / "step_2")
    return folder, model


def test_the_newest_checkpoint_of_a_run_or_a_named_one_is_opened(run):
    folder, _ = run
    assert recognise(folder) == recognise(folder / "checkpoints" / "step_2") == "run"
    newest, second = open_source(folder), open_source(folder / "checkpoints" / "step_2")
    assert (newest.format, newest.step, second.step) == ("run", 5, 2)
    assert newest.path == folder / "checkpoints" / "step_5"
    assert newest.config == CONFIG
    assert newest.load_tokenizer().encode("a") == [97]
    generation = newest.generation
    assert (generation.stop_ids, generation.bos_id, generation.pad_id) == ({257}, 256, 260)


def test_a_run_whose_vocabulary_names_no_padding_opens_like_any_other(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(folder / "tokenizer")
    # SmolLM2's and Llama 2's: what ends a text is named as padding too, which is none.
    letters = tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[])
    definition = tokenizers.Tokenizer(letters)
    definition.decoder = tokenizers.decoders.ByteLevel()
    definition.add_special_tokens(["<end>"])
    words = {"eos_token": "<end>", "pad_token": "<end>"}
    HuggingFaceTokenizer(definition.to_str(), words).save(folder / "tokenizer")
    generation = open_source(folder).generation
    assert (generation.stop_ids, generation.bos_id, generation.pad_id) == ({2}, None, None)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_parameters_are_restored_bit_by_bit_with_the_shardings_of_another_mesh(run, mesh):
    folder, saved = run
    mesh = make_mesh(mesh)
    model = load_model(open_source(folder), F32, mesh)
    for path, values in params_of(saved).items():
        np.testing.assert_array_equal(params_of(model)[path], values)
    found = dict(nnx.to_flat_state(nnx.state(model)))
    for path, leaf in nnx.to_flat_state(abstract_model(CONFIG, F32, mesh)[1]):
        assert found[path][...].sharding == leaf.get_value().sharding, path


def test_one_device_and_bfloat16(run):
    folder, saved = run
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = load_model(open_source(folder), ExecutionConfig(param_dtype="bfloat16"), mesh)
    for path, values in params_of(saved).items():
        np.testing.assert_array_equal(params_of(model)[path], values.astype(BFLOAT16))


def test_tensors_of_a_run_are_those_of_its_model(run):
    folder, saved = run
    source = open_source(folder)
    params = params_of(saved)
    read = source.tensors["layers.1.attention.q_proj"].read((slice(16, 48), slice(3, 9)))
    q_DNH = params["layers.attention.q_proj"][1]
    np.testing.assert_array_equal(read, q_DNH[3:9, 1:3].reshape(6, 32).T)
    bias = source.tensors["layers.0.attention.k_bias"]
    assert (bias.shape, bias.dtype, bias.kind) == ((32,), np.float32, "F32")
    np.testing.assert_array_equal(source.tensors["lm_head"].read_all(), params["lm_head"].T)


def test_only_the_last_arrays_are_kept_in_memory(run, monkeypatch):
    from llama_jax.interchange import orbax_arrays

    monkeypatch.setattr(orbax_arrays, "_KEPT_BYTES", 0)
    source = RunSource(run[0])
    for name in ("embedding", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"):
        source.tensors[name].read_all()
    assert list(source._arrays._kept) == [source._arrays._keys[("layers", "mlp", "up_proj")]]


def test_a_config_of_another_model_is_told_by_the_array(run, tmp_path):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "config.toml").read_text()

    def refused(old, new):
        assert old in text
        (tmp_path / "config.toml").write_text(text.replace(old, new))
        with pytest.raises(InterchangeError) as caught:
            open_source(tmp_path)
        return str(caught.value)

    assert "down_proj.value has shape [2, 48, 32]; the config asks for [2, 50, 32]" in refused(
        "mlp_dim = 48", "mlp_dim = 50"
    )
    assert "k_bias.value has shape [2, 2, 16]; the config asks for [2, 4, 8]" in refused(
        "num_heads = 8\nnum_kv_heads = 2\nhead_dim = 16",
        "num_heads = 16\nnum_kv_heads = 4\nhead_dim = 8",
    )
    assert "mlp.down_bias.value has no place in the model" in refused(
        "mlp_bias = true", "mlp_bias = false"
    )
    assert "lm_head.value has no place" in refused(
        "tie_embeddings = false", "tie_embeddings = true"
    )


def test_runs_without_a_checkpoint_and_damaged_ones_are_told(run, tmp_path):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    state = tmp_path / "checkpoints" / "step_5" / "state"
    for file in (state / "d").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InterchangeError, match="step_5/state: "):
        load_model(open_source(tmp_path), F32, make_mesh(MeshConfig()))
    (state / "_METADATA").unlink()
    with pytest.raises(InterchangeError, match="step_5/state: "):
        open_source(tmp_path)
    with pytest.raises(InterchangeError, match="no step 4; there are 2, 5"):
        RunSource(tmp_path, 4)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step_9.orbax-checkpoint-tmp-1").mkdir(parents=True)
    with pytest.raises(InterchangeError, match="checkpoints: no complete checkpoint"):
        open_source(tmp_path)


@pytest.mark.short
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
def test_orbax_folders_are_read_back_bit_by_bit(dtype, tmp_path):
    source = random_source(CONFIG, dtype=dtype)
    write_orbax(source, tmp_path, tokenizer=ByteTokenizer())
    back = open_source(tmp_path)
    assert (back.format, back.config) == ("orbax", CONFIG)
    assert back.chat_template == source.chat_template
    assert back.load_tokenizer().vocab_size == 272
    assert_bit_equal(source, back)


def test_an_orbax_folder_loads_onto_any_mesh_as_the_same_model(tmp_path):
    config = CASES["grouped_llama3_tied"]
    source = random_source(config)
    write_orbax(source, tmp_path)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    wanted = logits(load_model(source, F32, one), one, reference_batch(config))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    model = load_model(open_source(tmp_path), F32, mesh)
    np.testing.assert_allclose(logits(model, mesh, reference_batch(config)), wanted, atol=2e-5)


def test_layers_of_unequal_dtype_are_widened_together(tmp_path):
    source = random_source(CASES["linear"], dtype=BFLOAT16)
    name = "layers.0.attn_norm.scale"
    source.arrays[name] = source.arrays[name].astype(np.float32)
    write_orbax(source, tmp_path)
    back = open_source(tmp_path)
    kinds = {n: t.kind for n, t in back.tensors.items() if t.kind != "BF16"}
    assert kinds == {name: "F32", "layers.1.attn_norm.scale": "F32"}
    for name, array in source.arrays.items():
        np.testing.assert_array_equal(
            back.tensors[name].read_all().astype(np.float32), array.astype(np.float32)
        )


def test_a_nan_in_stacked_arrays_is_told_by_its_layer(tmp_path):
    source = random_source(CONFIG)
    source.arrays["layers.1.mlp.up_proj"][0, 0] = np.nan
    write_orbax(source, tmp_path)
    with pytest.raises(InterchangeError, match=r"tensor layers\.mlp\.up_proj\[1\] holds a NaN"):
        load_model(open_source(tmp_path), F32, make_mesh(MeshConfig()))
