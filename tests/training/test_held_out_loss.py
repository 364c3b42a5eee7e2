"""Held-out losses of checkpoints: those that their runs told, for every objective that can be."""

import dataclasses
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError
from llama_jax.interchange.averaging_source import AveragedSource
from llama_jax.interchange.opening import open_source
from llama_jax.training import held_out_loss
from llama_jax.training.held_out_loss import opened_held_out_loss
from llama_jax.training.run import train

sys.path.append(str(Path(__file__).parents[1] / "interchange"))

from in_memory import random_source

QUICK = (
    *("model.embed_dim=32", "model.mlp_dim=64", "data.sources.0.{records}.max_records=30"),
    *("data.held_out.0.{records}.max_records=9", "training.steps=2", "metrics.progress=false"),
    *("schedule.warmup_steps=0", "schedule.peak=1e-2", "training.sample_prompts=[]"),
)


def config_of(stage, *settings):
    records = "conversations" if stage == "sft" else "preferences"
    quick = [setting.format(records=records) for setting in QUICK]
    return load_run_config(f"debug/{stage}", [*quick, *settings])


def trained(stage, folder, *settings):
    """A run's held-out figures."""
    config = config_of(stage, *settings)
    return train(config, folder / stage, Console(file=io.StringIO())).figures["held_out"]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    return folder / "sft", trained("sft", folder)


def loss_of(config, path, said=None):
    say = [].append if said is None else said.append
    with opened_held_out_loss(config, path, say=say) as loss:
        return loss(open_source(path))


def test_a_runs_last_checkpoint_has_the_loss_that_the_run_told(sft):
    path, held_out = sft
    said = []
    assert loss_of(config_of("sft"), path, said) == pytest.approx(held_out["loss"], rel=1e-6)
    assert said == ["attention: reference on cpu"]


def test_a_mean_is_scored_like_a_checkpoint_and_by_one_compilation(sft, monkeypatch):
    path, held_out = sft
    made = []
    assemble = held_out_loss.assemble
    monkeypatch.setattr(
        held_out_loss, "assemble", lambda *parts: made.append(assemble(*parts)) or made[0]
    )
    source = open_source(path)
    # Stored apart, so that the mean of the two is what the run has.
    tensors = source.tensors
    moved = [
        {
            name: dataclasses.replace(t, read=lambda s, t=t, by=by: t.read(s) + by)
            for name, t in tensors.items()
        }
        for by in (-0.125, 0.125)
    ]
    apart = [_Moved(source, table) for table in moved]
    with opened_held_out_loss(config_of("sft"), path, say=lambda line: None) as loss:
        assert loss(AveragedSource(apart)) == pytest.approx(held_out["loss"], rel=1e-5)
        assert loss(apart[0]) > held_out["loss"] + 0.1
    assert made[0].eval_step.compilations == 1


class _Moved:
    """A source with other tensors; it isn't restored whole."""

    def __init__(self, source, tensors):
        self.config, self.tensors, self.path = source.config, tensors, source.path
        self.chat_template, self.generation = source.chat_template, source.generation
        self.format, self.stored_name = "moved", source.stored_name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_reward_and_dpo_runs_too_a_cached_reference_or_not(stage, tmp_path):
    held_out = trained(stage, tmp_path)
    found = loss_of(config_of(stage), tmp_path / stage)
    assert found == pytest.approx(held_out["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_teachers_divergence_too(sft, tmp_path):
    path, _ = sft
    settings = ("model.num_layers=2", f"objective.path={path}")
    distill = (*[s.format(records="conversations") for s in QUICK], *settings)
    config = load_run_config("debug/distill", distill)
    held_out = train(config, tmp_path / "student", Console(file=io.StringIO())).figures["held_out"]
    found = loss_of(config, tmp_path / "student")
    assert found == pytest.approx(held_out["loss"], rel=1e-5)


def test_another_model_is_refused_by_its_field(sft):
    path, _ = sft
    with pytest.raises(ConfigError, match=r"model.mlp_dim: 128, but 64 in .*sft"):
        loss_of(config_of("sft", "model.mlp_dim=128"), path)
    # A reward head that isn't there would be drawn.
    with pytest.raises(ConfigError, match=r"model.head: 'scalar', but 'vocab' in .*sft"):
        loss_of(config_of("reward"), path)


def test_what_can_not_be_scored_is_told_before_anything_is_loaded(sft, monkeypatch):
    path, _ = sft
    monkeypatch.setattr(held_out_loss, "assemble", lambda *parts: pytest.fail("assembled"))
    with pytest.raises(ConfigError, match=r"data.held_out: nothing is held out to choose by"):
        loss_of(config_of("sft", "data.held_out=[]"), path)
    stored = 'objective={kind="distill", path="runs/sft", teacher="stored"}'
    with pytest.raises(ConfigError, match=r"objective.teacher: .* set it to 'live'"):
        loss_of(config_of("sft", stored), path)


def test_of_an_adapter_run_whole_models_are_scored_but_not_against_half_a_reference(sft):
    path, held_out = sft
    adapted = (f'init={{path="{path}", adapter="none/such"}}', "adapter={rank=2, alpha=4.0}")
    assert loss_of(config_of("sft", *adapted), path) == pytest.approx(held_out["loss"], rel=1e-6)
    with pytest.raises(ConfigError, match=r"init.adapter: the reference would be the base alone"):
        loss_of(config_of("dpo", *adapted), path)


def test_a_tokenizer_that_gives_other_ids_is_refused_and_a_trained_one_is_the_checkpoints(
    sft, monkeypatch
):
    path, held_out = sft
    trained = 'tokenizer={kind="train", vocab_size=272}'
    config = config_of("sft", trained)
    assert loss_of(config, path) == pytest.approx(held_out["loss"], rel=1e-6)
    with (
        pytest.raises(ConfigError, match=r"tokenizer.kind: a trained one is the checkpoints' own"),
        opened_held_out_loss(config, path, own_tokenizer=False, say=lambda line: None),
    ):
        pass
    monkeypatch.setattr(type(random_source().tokenizer), "fingerprint", property(lambda t: id(t)))
    with pytest.raises(ConfigError, match=r"tokenizer: another one than that of .*sft, whose ids"):
        loss_of(config_of("sft"), path)
