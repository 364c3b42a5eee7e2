"""A run that trained adapters, as a checkpoint of its own and as an adapter."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from in_memory import CONFIG, logits, random_source

from llama_jax.checkpoint.manager import Checkpoints
from llama_jax.cli.main import main
from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError, to_table, to_toml
from llama_jax.config.post_training import AdapterConfig, InitConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.adapters import AdaptedSource
from llama_jax.interchange.converting import convert
from llama_jax.interchange.fingerprints import model_fingerprint
from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.opening import open_adapter, open_source
from llama_jax.interchange.starting import load_params_into
from llama_jax.interchange.tensors import InterchangeError
from llama_jax.models.lora import split_params
from llama_jax.optim.optimizer import make_optimizer
from llama_jax.optim.schedule import make_schedule
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.training.state import init_state

F32 = ExecutionConfig(compute_dtype="float32")
DORA = AdapterConfig(rank=2, alpha=3.0, dora=True)
IDS = np.random.default_rng(2).integers(0, 288, 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folders of a base and of a reward-model run with DoRA on it, and the trained model."""
    base, folder = (tmp_path_factory.mktemp(name) for name in ("base", "run"))
    write_hugging_face(random_source(), base, tokenizer=ByteTokenizer())
    model = dataclasses.replace(CONFIG, head="scalar")
    stage = load_run_config("reward")
    data = dataclasses.replace(stage.data, seq_len=64)
    start = InitConfig(path=str(base))
    config = dataclasses.replace(stage, model=model, data=data, adapter=DORA, init=start)
    (folder / "config.toml").write_text(to_toml(to_table(config)))
    ByteTokenizer().save(folder / "tokenizer")
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    trained = load_params_into(open_source(base), model, F32, mesh, adapter=DORA).model
    params, frozen = split_params(nnx.state(trained))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.2 * random.standard_normal(x.shape).astype(x.dtype), params
    )
    optimizer = make_optimizer(config.optimizer, make_schedule(config.schedule, 10))
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints, jax.set_mesh(mesh):
        state = init_state(params, optimizer, jax.random.key(0), {"base": frozen})
        checkpoints.save(4, dataclasses.replace(state, frozen={}), {})
    arrays = {
        ".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)
    }
    return base, folder, arrays


def test_its_checkpoint_is_its_base_with_its_adapters_merged(run):
    _, folder, trained = run
    source = open_source(folder)
    assert (source.format, source.config.head) == ("run", "scalar")
    assert source.path == folder / "checkpoints" / "step_4"
    assert source.load_tokenizer().vocab_size == 272
    assert source.generation.bos_id == 256
    up, a, b, scale = (
        f"layers.mlp.up_proj{end}" for end in ("", "_lora_a", "_lora_b", "_dora_scale")
    )
    w = random_source().arrays["layers.1.mlp.up_proj"].T + 1.5 * trained[a][1] @ trained[b][1]
    w *= trained[scale][1] / np.sqrt((w**2).sum(0))
    found = source.tensors["layers.1.mlp.up_proj"].read_all()
    np.testing.assert_allclose(found, w.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(source.tensors["reward_head"].read_all(), trained["reward_head"])
    assert up not in trained
    assert "lm_head" not in source.tensors


def test_merged_into_its_base_it_has_the_runs_template_and_ends_of_turns(run, tmp_path):
    base, folder, _ = run
    end = ByteTokenizer().special["<|eot_id|>"]
    assert end not in open_source(base).generation.stop_ids
    report = convert(base, tmp_path / "merged", "hf", adapter=folder)
    assert any("knows the byte tokenizer" in note for note in report.notes)
    merged = open_source(tmp_path / "merged")
    assert end in merged.generation.stop_ids
    assert "<|start_header_id|>" in merged.chat_template


def test_its_adapter_stands_alone_too_and_goes_to_peft_and_back(run, tmp_path):
    base, folder, _ = run
    adapter = open_adapter(folder)
    assert (adapter.config, adapter.partial) == (DORA, False)
    assert len(adapter.tensors) == 2 * 7 * 3 + 1
    wanted_T = logits(open_source(folder), IDS)
    report = convert(folder, tmp_path / "peft", "peft")
    assert report.exact
    assert report.comparison.max_difference == 0
    table = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (table["base_model_name_or_path"], table["task_type"]) == (str(base), "SEQ_CLS")
    for again in (open_source(tmp_path / "peft"), open_source(base, adapter=tmp_path / "peft")):
        np.testing.assert_array_equal(logits(again, IDS), wanted_T)
    assert isinstance(open_source(base, adapter=folder), AdaptedSource)


def test_neither_the_adapter_nor_its_base_is_overwritten_by_what_they_make(run, tmp_path):
    base, folder, _ = run
    merged = open_source(folder)
    convert(folder, tmp_path / "peft", "peft")
    for src, adapter, dst in (
        (folder, None, base),
        (tmp_path / "peft", None, base),
        (base, tmp_path / "peft", tmp_path / "peft"),
    ):
        with pytest.raises(ConfigError, match=f"{dst}: holds {dst}, which SRC is merged from"):
            convert(src, dst, "hf", adapter=adapter, overwrite=True)
    np.testing.assert_array_equal(logits(open_source(folder), IDS), logits(merged, IDS))


def test_a_run_with_nothing_but_adapters_or_without_any_is_told(run, tmp_path):
    _, folder, _ = run
    text = (folder / "config.toml").read_text()
    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    drawn = to_toml({k: v for k, v in _table(text).items() if k != "init"})
    (tmp_path / "config.toml").write_text(drawn)
    with pytest.raises(ConfigError, match=r"adapter: adapters need weights to stand beside"):
        open_source(tmp_path)
    (tmp_path / "config.toml").write_text(
        to_toml({k: v for k, v in _table(text).items() if k not in ("init", "adapter")})
    )
    with pytest.raises(InterchangeError, match="a run that trained no adapter"):
        open_adapter(tmp_path)


def test_rows_that_a_run_gave_another_start_are_its_checkpoints_too(run, tmp_path):
    _, folder, _ = run
    base = random_source()
    new = max(ByteTokenizer().special.values())
    base.arrays["embedding"][new] = 0
    write_hugging_face(base, tmp_path / "base", tokenizer=ByteTokenizer())
    table = _table((folder / "config.toml").read_text())
    table["init"] = {"path": str(tmp_path / "base"), "special_rows": "mean"}
    (tmp_path / "config.toml").write_text(to_toml(table))
    for name in ("checkpoints", "tokenizer"):
        (tmp_path / name).symlink_to(folder / name)
    config = load_run_config(str(tmp_path / "config.toml"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    start = load_params_into(
        open_source(tmp_path / "base"), config.model, F32, mesh,
        adapter=DORA, seed=config.seed, tokenizer=ByteTokenizer(), special_rows="mean",
    )  # fmt: skip
    found = open_source(tmp_path).tensors["embedding"].read_all()
    np.testing.assert_array_equal(found, np.asarray(start.model.embedding[...]))
    assert np.abs(found[new]).max() > 0
    with pytest.raises(ConfigError, match=r"--to: .* also changed rows of special tokens"):
        convert(tmp_path, tmp_path / "peft", "peft")
    with pytest.raises(InterchangeError, match="also changed rows of special tokens"):
        open_adapter(tmp_path)


def test_a_run_is_not_merged_into_what_its_base_has_become(run, tmp_path):
    base, folder, _ = run
    for name in ("checkpoints", "tokenizer", "config.toml"):
        (tmp_path / name).symlink_to(folder / name)
    noted = {"init.path": model_fingerprint(open_source(base))}
    (tmp_path / "origins.json").write_text(json.dumps(noted))
    assert open_source(tmp_path).config.head == "scalar"
    (tmp_path / "origins.json").write_text('{"init.path": "0123456789abcdef"}')
    with pytest.raises(InterchangeError, match=r"holds another model now .*\(0123456789abcdef\)"):
        open_source(tmp_path)
    # Named by its user, it may stand beside any.
    open_source(base, adapter=tmp_path)
    moved = base.rename(base.parent / "moved")
    try:
        with pytest.raises(InterchangeError, match=rf"{tmp_path} trained adapters on the checkpoi"):
            open_source(tmp_path)
    finally:
        moved.rename(base)


def _table(text):
    import tomllib

    return tomllib.loads(text)


def test_generate_takes_an_adapter_by_its_option(tmp_path, capsys):
    from test_peft import random_adapter, write_peft

    write_hugging_face(random_source(), tmp_path / "base", tokenizer=ByteTokenizer())
    write_peft(random_adapter(), tmp_path / "adapter", "elsewhere", CONFIG.head_dim)
    convert(tmp_path / "base", tmp_path / "whole", "hf", adapter=tmp_path / "adapter", verify=False)

    def generated(*model):
        arguments = ["--prompt", "ab", "--max-new-tokens", "6", "--temperature", "0", "--json"]
        assert main(["generate", *map(str, model), *arguments]) == 0
        return json.loads(capsys.readouterr().out)["ids"]

    plain = generated("--model", tmp_path / "base")
    adapted = generated("--model", tmp_path / "base", "--adapter", tmp_path / "adapter")
    assert adapted == generated("--model", tmp_path / "whole")
    assert adapted != plain
