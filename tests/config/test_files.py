"""Finding configs by path and by shipped name; every shipped run loads."""

import pytest

from llama_jax.config.files import find_config, load_run_config, shipped_configs
from llama_jax.config.loading import ConfigError
from llama_jax.config.run import AdamWConfig, LionConfig

pytestmark = pytest.mark.short

RUNS = sorted((shipped_configs() / "runs").rglob("*.toml"))

RUN = """
model = "llama3.2-1b"
tokenizer = {kind = "byte"}
training = {steps = 10}
schedule = {peak = 1e-3}
[data]
seq_len = 64
batch_size = 8
sources = [{name = "text", text = {path = "x.txt"}}]
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_shipped_run_loads_by_path_and_by_name(path):
    assert load_run_config(str(path)) == load_run_config(f"{path.parent.name}/{path.stem}")


def test_runs_are_shipped():
    assert {"quickstart", "tiny"} <= {path.stem for path in RUNS}


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"lama3\.1-8b: .*did you mean 'llama3.1-8b'"):
        find_config("lama3.1-8b", "models")


def test_a_model_is_taken_by_name_and_changed_by_set(run_file):
    config = load_run_config(str(run_file), ["model.num_layers=2", "data.seq_len=32"])
    assert (config.model.num_layers, config.model.embed_dim, config.data.seq_len) == (2, 2048, 32)
    other = load_run_config(str(run_file), ["model=llama3.1-8b"])
    assert other.model.embed_dim == 4096


def test_a_model_table_changes_its_base(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        RUN.replace('model = "llama3.2-1b"', 'model = {base = "llama3.2-1b", num_layers = 3}')
    )
    assert load_run_config(str(path)).model.num_layers == 3


def test_a_bad_model_name_names_the_run_file(run_file):
    with pytest.raises(ConfigError, match=r"--set|run\.toml: model: .*did you mean"):
        load_run_config(str(run_file), ["model=llama3.2-1"])


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return str(folder / "run.toml")


def test_a_run_changes_its_base_key_by_key(tmp_path):
    child = """
    base = "recipe.toml"
    model = {num_layers = 3}
    training = {microbatches = 2}
    [data]
    sources = [{name = "other", shards = "/data/other"}]
    """
    config = load_run_config(write(tmp_path, recipe=RUN, run=child), ["training.steps=20"])
    assert (config.model.num_layers, config.model.embed_dim) == (3, 2048)
    assert (config.training.steps, config.training.microbatches) == (20, 2)
    assert (config.data.seq_len, config.data.batch_size) == (64, 8)
    assert [source.name for source in config.data.sources] == ["other"]


def test_a_table_of_another_kind_replaces_its_base(tmp_path):
    recipe = "optimizer = {kind = 'adamw', b2 = 0.9}\n" + RUN
    text = "base = 'recipe.toml'\noptimizer = {kind = 'lion'}"
    assert load_run_config(write(tmp_path, recipe=recipe, run=text)).optimizer == LionConfig()
    text = "base = 'recipe.toml'\noptimizer = {weight_decay = 0.2}"
    changed = load_run_config(write(tmp_path, recipe=recipe, run=text)).optimizer
    assert changed == AdamWConfig(b2=0.9, weight_decay=0.2)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("llama3-8", r"run\.toml: base: llama3-8: no such file or shipped config"),
        ("run.toml", r"run\.toml: base: .*run\.toml is based on this file"),
        (3, r"run\.toml: base: expected the name of a recipe or file, got 3"),
    ],
)
def test_a_bad_base_names_the_file(tmp_path, base, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(write(tmp_path, run=f"base = {base!r}\n{RUN}"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.seq_len=1000000", "data.seq_len: 1000000 is longer than model.max_seq_len, 131072"),
        ("training.microbatches=3", "training.microbatches: 3 does not divide data.batch_size, 8"),
        ("schedule.warmup_steps=11", "warm-up and decay take 11 steps, training.steps is 10"),
        ("schedule.decay_steps=2", "schedule.decay_steps: has no meaning for kind 'cosine'"),
        (
            "schedule={kind='constant', peak=1e-3, final_fraction=0.5}",
            "schedule.final_fraction: has no meaning for kind 'constant'",
        ),
        ("hardware.slice=v5e-9", "hardware.slice: no slice is called 'v5e-9' (did you mean"),
        ("mesh.data=0", "mesh.data: 0 devices"),
        ("mesh.data=-1", "mesh.fsdp: at most one axis may be -1"),
        ("model.num_kv_heads=7", "model.num_kv_heads: 7 does not divide num_heads, 32"),
        ("model.head_dim=63", "model.head_dim: 63 is odd"),
        ("data.sources.0.weight=0", "data.sources.0.weight: 0.0 must be above 0"),
        ("data.sources=[]", "data.sources: at least one source is needed"),
        ("optimizer.kind=adam", "optimizer.kind: unknown kind 'adam' (did you mean 'adamw'?)"),
        ("optimizer.kind=lion", None),
    ],
)
def test_contradictions_are_refused_with_the_field_named(run_file, override, expected):
    if expected is None:
        assert load_run_config(str(run_file), [override]).optimizer.kind == "lion"
        return
    with pytest.raises(ConfigError) as caught:
        load_run_config(str(run_file), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_in_two_folders_needs_its_folder():
    with pytest.raises(ConfigError, match=r"bench/llama3\.1-8b-v5p-8 or pretrain/llama3"):
        find_config("llama3.1-8b-v5p-8", "runs")
    assert find_config("bench/llama3.1-8b-v5p-8", "runs").parent.name == "bench"
    assert find_config("tiny", "runs") == find_config("debug/tiny", "runs")
