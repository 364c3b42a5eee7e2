"""Which fields may differ between a checkpoint and the config that continues it."""

import dataclasses

import pytest

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError
from llama_jax.training.compatibility import changes, check_compatible, may_change


@pytest.fixture(scope="module")
def config():
    return load_run_config("tiny")


@pytest.mark.parametrize(
    "setting",
    [
        "mesh.tensor=2", "execution.attention=blockwise", "execution.compute_dtype=bfloat16",
        "execution.remat=full", "training.microbatches=2", "metrics.progress=false",
        "checkpoint.every=7", "checkpoint.keep_every=5", "training.eval_every=9",
        "training.sample_tokens=3", "training.steps=90", "data.workers=1", "data.prefetch=9",
        "data.held_out=[]", "training.max_skipped_steps=3", "data.sources.0.text.path=/x",
    ],
)  # fmt: skip
def test_what_changes_no_number_may_change_and_is_told(config, setting):
    changed = load_run_config("tiny", [setting])
    notices = check_compatible(config, changed, "config.toml")
    assert notices
    assert all(notice.startswith("changed since the checkpoint: ") for notice in notices)


@pytest.mark.parametrize(
    "setting",
    [
        "model.num_layers=3", "model.norm_eps=1e-6", "model.rope.theta=5e5", "seed=1",
        "data.seq_len=32", "data.batch_size=16", "data.packing=best_fit",
        "data.sources.0.weight=2.0", "schedule.peak=1e-3", "schedule.warmup_steps=5",
        "optimizer.kind=lion", "optimizer={kind='adamw', b2=0.99}", "objective.z_loss=1e-4",
        "execution.param_dtype=bfloat16", "training.clip_norm=2.0", "data.sources.0.text.part=all",
    ],
)  # fmt: skip
def test_what_changes_the_numbers_is_refused_by_name(config, setting):
    overrides = [setting]
    if setting.startswith("objective"):
        overrides.insert(0, "objective.kind=next_token")
    changed = load_run_config("tiny", overrides)
    key = setting.split("=")[0].removesuffix(".kind")
    with pytest.raises(ConfigError, match=rf"^config\.toml: {key}.* contradicts the checkpoint"):
        check_compatible(config, changed, "config.toml")


def test_every_refused_field_is_named_at_once_with_both_values(config):
    changed = load_run_config("tiny", ["seed=3", "data.seq_len=32", "training.steps=70"])
    with pytest.raises(ConfigError) as error:
        check_compatible(config, changed, "config.toml")
    assert "data.seq_len (64 -> 32), seed (0 -> 3) contradicts" in str(error.value)
    assert "training.steps" not in str(error.value)


def test_an_unchanged_config_has_nothing_to_tell(config):
    assert check_compatible(config, dataclasses.replace(config), "config.toml") == []
    assert changes(config, config) == []


def test_a_field_that_no_rule_names_may_not_change():
    assert not may_change("some.new.field")
    assert may_change("data.sources.3.shards")
    assert not may_change("data.sources.3.name")
    assert may_change("data.sources.3.preferences.path")
    assert not may_change("data.sources.3.preferences.strength")
    assert not may_change("data.sources.3.conversations.chat_template")
    assert may_change("init.path")
    assert not may_change("init.layers")
