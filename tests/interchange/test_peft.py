"""Adapters in PEFT's format: its outputs are ours, both ways; merged or beside the weights."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import peft_reference
import pytest
from adapters_in_memory import SETTINGS, random_adapter, reference, run_of
from flax import nnx
from in_memory import CONFIG, logits, random_source, values_of
from peft_reference import FOLDER, IDS

from llama_jax.config.loading import ConfigError
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.adapters import AdaptedSource
from llama_jax.interchange.converting import convert
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.loading import load_model, load_params, load_tensors
from llama_jax.interchange.opening import open_adapter, open_source, recognise
from llama_jax.interchange.peft import PeftAdapter, write_peft
from llama_jax.interchange.safetensors_reading import read_header
from llama_jax.interchange.tensors import BFLOAT16, InterchangeError
from llama_jax.models.init import abstract_model
from llama_jax.models.lora import Adapter
from llama_jax.models.merging import merged
from llama_jax.sharding.mesh import make_mesh

LOGITS = 2e-5
F32 = ExecutionConfig(compute_dtype="float32")
WHOLE = ("lora", "dora", "rslora")


def beside(source, adapter, mesh):
    """The model with the adapter's factors beside its weights."""
    graphdef, abstract = abstract_model(source.config, F32, mesh, adapter.config)
    factors, weights = nnx.split_state(abstract, Adapter, ...)
    factors = load_tensors(adapter.tensors, factors, mesh)
    return nnx.merge(graphdef, factors, load_params(source, weights, mesh))


@pytest.mark.parametrize("name", [*WHOLE, "layer"])
def test_merged_adapters_of_peft_give_its_logits(name):
    source = AdaptedSource(random_source(), open_adapter(FOLDER / name))
    np.testing.assert_allclose(logits(source, IDS), reference(name), atol=LOGITS, rtol=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, tensor=2)], ids=["one", "four"])
@pytest.mark.parametrize("name", ["dora", "rslora"])
def test_factors_beside_the_weights_give_its_logits_and_merge_into_the_same(name, mesh):
    devices = 1 if mesh == MeshConfig() else 4
    mesh = make_mesh(mesh, jax.devices()[:devices])
    model = beside(random_source(), open_adapter(FOLDER / name), mesh)
    np.testing.assert_allclose(run_of(model, mesh), reference(name), atol=LOGITS, rtol=1e-5)
    whole = merged(model, mesh)
    assert (whole.adapter, len(nnx.to_flat_state(nnx.state(whole, Adapter)))) == (None, 0)
    np.testing.assert_allclose(run_of(whole, mesh), reference(name), atol=LOGITS, rtol=1e-5)
    # What has no adapter isn't copied.
    assert whole.embedding[...] is model.embedding[...]


def test_a_reward_models_adapter_makes_a_reward_model_of_its_base():
    source = AdaptedSource(random_source(), open_adapter(FOLDER / "reward"))
    assert source.config.head == "scalar"
    assert "lm_head" not in source.tensors
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    rewards_T = run_of(load_model(source, F32, mesh), mesh)
    assert rewards_T.shape == IDS.shape
    assert rewards_T[-1] == pytest.approx(reference("reward")[0], abs=LOGITS)


@pytest.mark.parametrize("name", [*WHOLE, "layer", "reward"])
def test_an_adapter_written_again_is_the_same_file_and_config(name, tmp_path):
    folder = FOLDER / name
    write_peft(PeftAdapter(folder), tmp_path, "base", CONFIG.head_dim)
    ours, theirs = (read_header(x / "adapter_model.safetensors") for x in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    for key, entry in theirs.items():
        whole = tuple(slice(0, size) for size in entry.shape)
        assert (ours[key].shape, ours[key].kind) == (entry.shape, entry.kind)
        np.testing.assert_array_equal(ours[key].read(whole), entry.read(whole))
    mine, table = (json.loads((x / "adapter_config.json").read_text()) for x in (tmp_path, folder))
    differ = {k for k, v in mine.items() if k in table and table[k] != v}
    # It lists target modules in any order; a classifier has two names.
    assert differ <= {"target_modules", "modules_to_save"}
    assert set(mine["target_modules"]) == set(table["target_modules"])


def test_how_to_chat_is_the_adapters_own_where_it_says():
    told = GenerationDefaults(frozenset({257}), chat_format="zephyr")
    base = random_source(chat_template="base's", generation=told)
    for template, name, wanted in (
        (None, None, ("base's", "zephyr")),
        ("own", None, ("own", None)),
        (None, "llama3", (None, "llama3")),
    ):
        source = AdaptedSource(base, random_adapter(chat_template=template, chat_format=name))
        assert (source.chat_template, source.generation.chat_format) == wanted
        assert source.generation.stop_ids == {257}


def test_slices_of_merged_weights_are_those_of_the_whole():
    source = random_source()
    for config in (SETTINGS, dataclasses.replace(SETTINGS, dora=True)):
        adapter = random_adapter(config)
        tensor = AdaptedSource(source, adapter).tensors["layers.1.attention.q_proj"]
        name = "layers.1.attention.q_proj"
        w, a, b = source.arrays[name], *(adapter.arrays[f"{name}_lora_{x}"] for x in "ab")
        whole = w + 4.0 / 3.0 * b @ a
        if config.dora:
            norms = np.sqrt((whole**2).sum(1))
            whole *= (adapter.arrays[f"{name}_dora_scale"] / norms)[:, None]
        np.testing.assert_allclose(tensor.read_all(), whole, rtol=1e-5, atol=1e-6)
        part = (slice(16, 40), slice(3, 9))
        np.testing.assert_allclose(tensor.read(part), whole[part], rtol=1e-5, atol=1e-6)
        assert (tensor.dtype, tensor.kind) == (np.float32, "F32")


def test_bfloat16_bases_merge_in_float32_and_convert_back_to_bfloat16(tmp_path):
    base = random_source(dtype=BFLOAT16)
    from llama_jax.interchange.hugging_face_writing import write_hugging_face

    write_hugging_face(base, tmp_path / "base", tokenizer=base.tokenizer)
    write_peft(random_adapter(), tmp_path / "adapter", "base", CONFIG.head_dim)
    report = convert(tmp_path / "base", tmp_path / "whole", "hf", adapter=tmp_path / "adapter")
    assert not report.exact
    assert set(report.kinds) == {"BF16"}
    # Rounding of the merged weights alone.
    assert 0 < report.comparison.max_difference < 0.02 * report.comparison.largest_logit
    assert any("LoRA adapter of rank 3 on q_proj, o_proj, up_proj" in x for x in report.notes)
    name = "layers.0.mlp.up_proj"
    merged_up = AdaptedSource(base, random_adapter()).tensors[name].read_all()
    found = open_source(tmp_path / "whole").tensors[name].read_all()
    np.testing.assert_array_equal(found, merged_up.astype(BFLOAT16))


def test_convert_takes_an_adapter_out_as_peft_reads_it(tmp_path):
    base = peft_reference.base_folder(tmp_path / "base")
    report = convert(base, tmp_path / "out", "peft", adapter=FOLDER / "dora")
    assert report.exact
    assert report.comparison.max_difference == 0
    assert report.tensors == 2 * 7 * 3
    assert recognise(tmp_path / "out") == "peft"
    # It names its base, which is there: the folder is a model.
    np.testing.assert_allclose(
        logits(open_source(tmp_path / "out"), IDS), reference("dora"), atol=LOGITS
    )
    shutil.rmtree(base)
    with pytest.raises(InterchangeError, match=r"an adapter; name its checkpoint \('.*base'\) too"):
        open_source(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--to: .* has no adapter; name one as --adapter"):
        convert(peft_reference.base_folder(base), tmp_path / "none", "peft")


WAYS = {
    "names": {"target_modules": ["0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
    "excluded": {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
    },
    "pattern": {"target_modules": r".*layers\.0\.(self_attn\.q|mlp\.up)_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
    "uneven": {"target_modules": r".*"},
}


@pytest.mark.parametrize("way", WAYS)
def test_adapters_of_some_layers_are_read_and_written_however_peft_names_these(way, tmp_path):
    base = peft_reference.base_folder(tmp_path / "base")
    adapter = random_adapter(dataclasses.replace(SETTINGS, targets=("q_proj", "up_proj")))
    kept = "mlp.up_proj" if way == "uneven" else "layers.0."
    for name in [x for x in adapter.arrays if "layers.1." in x and kept not in x]:
        del adapter.arrays[name]
    write_peft(adapter, tmp_path / "whole", str(base), CONFIG.head_dim)
    folder = changed(tmp_path / "whole", tmp_path / "some", **WAYS[way])
    convert(base, tmp_path / "again", "peft", adapter=folder)
    table = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    if way == "uneven":
        modules = {"layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"}
        assert set(table["target_modules"]) == {f"model.{name}" for name in modules}
    else:
        assert set(table["target_modules"]) == {"q_proj", "up_proj"}
        assert table["layers_to_transform"] == [0]
    wanted = AdaptedSource(open_source(base), dataclasses.replace(adapter, partial=True))
    for found in (open_source(base, adapter=folder), open_source(tmp_path / "again")):
        np.testing.assert_array_equal(logits(found, IDS), logits(wanted, IDS))


def changed(folder, target, **fields):
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not supported, only 'LORA'"),
        ({"bias": "lora_only"}, "bias: 'lora_only' is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern: {'q_proj': 4} is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the weights"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: 'lm_head' is trained whole"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules: 'lm_head' can't have an"),
        ({"r": "2"}, "r: expected a number, got '2'"),
        ({"r": 0}, "r: 0 must be above 0"),
    ],
)
def test_what_adapters_here_do_not_have_is_refused_by_field(fields, message, tmp_path):
    folder = changed(FOLDER / "lora", tmp_path / "x", **fields)
    with pytest.raises(ConfigError, match=message) as caught:
        open_adapter(folder)
    assert str(caught.value).startswith(f"{folder}/adapter_config.json: ")


def test_adapters_of_another_model_or_incomplete_ones_are_told_by_tensor(tmp_path):
    base = random_source()
    with pytest.raises(
        InterchangeError, match=r"lora_A\.weight has shape \[2, 96\]; the model and a rank of 4"
    ):
        AdaptedSource(base, open_adapter(changed(FOLDER / "lora", tmp_path / "rank", r=4)))
    adapter = random_adapter()
    del adapter.arrays["layers.1.mlp.up_proj_lora_b"]
    with pytest.raises(
        InterchangeError, match=r"the adapter has no layers\.1\.mlp\.up_proj_lora_b"
    ):
        AdaptedSource(base, adapter)
    with pytest.raises(
        InterchangeError, match=r"the adapter has no layers\.1\.mlp\.up_proj_lora_b"
    ):
        AdaptedSource(base, dataclasses.replace(adapter, partial=True))
    del adapter.arrays["layers.1.mlp.up_proj_lora_a"]
    AdaptedSource(base, dataclasses.replace(adapter, partial=True))
    deeper = random_adapter()
    deeper.arrays["layers.2.mlp.up_proj_lora_a"] = deeper.arrays["layers.1.mlp.up_proj_lora_a"]
    with pytest.raises(InterchangeError, match=r"layers\.2\.mlp\.up_proj_lora_a adapts nothing"):
        AdaptedSource(base, deeper)
    damaged = random_adapter()
    damaged.arrays["layers.0.attention.q_proj_lora_a"][0, 0] = np.nan
    with pytest.raises(InterchangeError, match=r"layers\.0\.attention\.q_proj_lora_a holds a NaN"):
        AdaptedSource(base, damaged)


def test_what_is_no_adapter_is_told(tmp_path):
    with pytest.raises(InterchangeError, match="nowhere: no such file or folder"):
        open_adapter(tmp_path / "nowhere")
    with pytest.raises(InterchangeError, match="no adapter: neither adapter_config"):
        open_adapter(tmp_path)
    shutil.copy(FOLDER / "lora" / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InterchangeError, match=r"no such file; adapter_model\.bin is a pickle"):
        open_adapter(tmp_path)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_reads_our_adapters_as_the_same_model(dora, tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("torch")
    adapter = random_adapter(AdapterConfig(rank=4, alpha=6.0, dora=dora), seed=3)
    base = peft_reference.base_folder(tmp_path / "base")
    write_peft(adapter, tmp_path / "adapter", str(base), CONFIG.head_dim)
    model = peft.PeftModel.from_pretrained(peft_reference.their_base(base), tmp_path / "adapter")
    theirs = peft_reference.their_outputs(model.eval())
    ours = logits(AdaptedSource(open_source(base), adapter), IDS)
    np.testing.assert_allclose(ours, theirs, atol=5 * LOGITS, rtol=1e-5)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [*WHOLE, "reward"])
def test_peft_makes_the_stored_reference_again(name, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("torch")
    base = peft_reference.base_folder(tmp_path / "base")
    reward = name == "reward"
    model = peft_reference.their_adapter(
        peft_reference.their_base(base, reward=reward), peft_reference.CASES[name]
    )
    model.save_pretrained(tmp_path / "adapter")
    ours, theirs = (values_of(PeftAdapter(x)) for x in (tmp_path / "adapter", FOLDER / name))
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(
        peft_reference.their_outputs(model, reward=reward), reference(name), atol=LOGITS
    )
