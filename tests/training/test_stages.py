"""The debug runs of post-training, end to end: what they tell, and that they go on as they were."""

import io
import math
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from rich.console import Console

from llama_jax.config.files import load_run_config
from llama_jax.config.hardware import find_slice
from llama_jax.config.loading import ConfigError
from llama_jax.data.documents import DataError
from llama_jax.interchange.opening import open_adapter, open_source
from llama_jax.interchange.tensors import InterchangeError
from llama_jax.metrics.records import read_records
from llama_jax.planning.compiling import compile_step, lower_step
from llama_jax.training import loop
from llama_jax.training.assembly import stored_fields
from llama_jax.training.run import train
from llama_jax.training.stopping import StopRequest

QUICK = (
    *("model.embed_dim=32", "model.mlp_dim=64", "data.sources.0.{records}.max_records=60"),
    *("data.held_out.0.{records}.max_records=12", "training.steps=4", "training.eval_every=2"),
    *("checkpoint.every=2", "metrics.progress=false", "schedule.warmup_steps=1"),
)
CLOCK = ("tokens_per_s", "goodput")


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv(loop.RECOMPILATION_VARIABLE, "error")


def config_of(stage, *settings):
    records = "conversations" if stage in ("sft", "distill") else "preferences"
    quick = [setting.format(records=records) for setting in QUICK]
    return load_run_config(f"debug/{stage}", [*quick, *settings])


def run(run_dir, stage, *settings):
    text = io.StringIO()
    outcome = train(config_of(stage, *settings), run_dir, Console(file=text, width=200))
    return outcome, text.getvalue()


def told(run_dir):
    records = read_records(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("dpo") / "run"
    return run_dir, *run(run_dir, "dpo")


def test_dpo_begins_at_log_2_and_tells_of_its_pairs(dpo):
    first = told(dpo[0])[0]
    assert first["loss"] == pytest.approx(math.log(2) + 0.2 * first["nll"], abs=1e-6)
    assert abs(first["margin"]) < 1e-6
    assert first["margin"] == pytest.approx(first["chosen_reward"] - first["rejected_reward"])
    assert {"accuracy", "pairs", "tokens"} <= first.keys()
    held_out = dpo[1].figures["held_out"]
    assert {"loss", "margin", "accuracy", "nll"} <= held_out.keys()
    assert "bits_per_byte" not in held_out
    assert (dpo[0] / "plots" / "figures.png").stat().st_size > 10_000


def test_a_preference_runs_samples_are_replies_in_its_chat_format(dpo):
    assert "user\n\nWhat is 2 + 3?assistant\n\n" in (dpo[0] / "samples.txt").read_text()


@pytest.mark.slow
def test_a_stopped_dpo_run_goes_on_the_same_with_the_references_it_has_stored(
    dpo, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:

        def wanted(self, now):
            if now == 3:
                self.signal_number = 15
            return self.signal_number is not None

        patched.setattr(StopRequest, "wanted", wanted)
        assert run(tmp_path, "dpo")[0].exit_code == 143
    stored = tmp_path / "data" / "sources" / "arithmetic" / "reference_logps.npz"
    written = stored.stat().st_mtime_ns
    outcome, text = run(tmp_path, "dpo")
    assert "under the reference" not in text
    assert stored.stat().st_mtime_ns == written
    assert outcome.step == 4
    assert told(tmp_path) == told(dpo[0])


@pytest.mark.slow
def test_stored_references_of_other_examples_are_refused(dpo, tmp_path):
    run(tmp_path, "dpo", "training.steps=2")
    stored = tmp_path / "data" / "sources" / "arithmetic" / "reference_logps.npz"
    with np.load(stored) as found:
        logps_ER = found["logps_ER"]
    np.savez(stored, logps_ER=logps_ER, examples="others")
    with pytest.raises(DataError, match=r"reference_logps.npz is of other examples"):
        run(tmp_path, "dpo")


@pytest.mark.slow
def test_references_of_an_attempt_that_began_with_another_model_are_made_again(dpo, tmp_path):
    shutil.copytree(dpo[0] / "data", tmp_path / "data")
    # Killed before it saved anything, and begun again from other weights.
    run(tmp_path, "dpo", "seed=7", "training.steps=1", "schedule.warmup_steps=0")
    first = told(tmp_path)[0]
    assert first["loss"] == pytest.approx(math.log(2) + 0.2 * first["nll"], abs=1e-6)
    assert abs(first["margin"]) < 1e-6


@pytest.mark.slow
def test_a_live_reference_gives_the_losses_of_stored_ones_on_another_mesh(dpo, tmp_path):
    run(tmp_path, "dpo", "objective.reference=live", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2")
    for live, stored in zip(told(tmp_path), told(dpo[0]), strict=True):
        if "loss" in live:
            assert live["loss"] == pytest.approx(stored["loss"], rel=1e-5)
            assert live["accuracy"] == pytest.approx(stored["accuracy"])


def test_a_reward_run_tells_accuracy_by_strength_and_calibration(tmp_path):
    outcome, text = run(tmp_path, "reward")
    first = told(tmp_path)[0]
    assert {"loss", "accuracy", "margin", "pairs"} <= first.keys()
    assert not [name for name in first if name.startswith(("correct_", "pairs_", "bins_"))]
    held_out = outcome.figures["held_out"]
    assert {"accuracy", "calibration_error"} <= held_out.keys()
    assert "held-out loss" in text


@pytest.mark.short
def test_fine_tuning_learns_what_assistants_write_and_nothing_else(tmp_path):
    run(tmp_path, "sft", "training.steps=12", "training.eval_every=4")
    records = told(tmp_path)
    losses = [record["held_out"]["loss"] for record in records if "held_out" in record]
    assert losses == sorted(losses, reverse=True)
    # Of eight rows of 128 places about a sixth is written by the assistant.
    assert 0.05 < records[0]["tokens"] / (8 * 128) < 0.3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("objective.kind=reward",), r"model\.head: objective 'reward' needs 'scalar'"),
        (("objective.kind=next_token",), " objective: 'next_token' reads text or conversations"),
        (("objective.loss=kto",), "mismatched of 'arithmetic' is false, but loss 'kto' needs it"),
        (
            ("data.sources.0.preferences.mismatched=true",),
            "mismatched of 'arithmetic' is true, which only loss 'kto' reads",
        ),
        (("data.sources.0.preferences.shared_prompt=true",), "only a reward model may share"),
    ],
)
def test_stages_that_contradict_their_data_are_refused_in_one_line(settings, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        train(config_of("dpo", *settings), tmp_path, Console(quiet=True))


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_stages_step_is_traced_for_a_tpu_without_its_data(stage):
    pytest.importorskip("libtpu")
    config = config_of(stage, "data.sources.0.name=elsewhere")
    lowered = lower_step(config, find_slice("v5e-1"))
    fields = stored_fields(config)
    assert ("reference_logps" in fields) == (stage == "dpo")
    sizes = [np.prod(field.shape) * np.dtype(field.dtype).itemsize for field in fields.values()]
    assert lowered.state_bytes.batch == sum(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("sft",), ("reward",), ("dpo", "objective.reference=live")])
def test_a_stages_step_compiles_for_a_tpu(settings):
    pytest.importorskip("libtpu")
    compiled = compile_step(config_of(*settings), find_slice("v5e-4"), 1, {})
    assert compiled.memory.peak_bytes > 0


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A student of the debug SFT run's model, the teacher held beside it, and the teacher's run."""
    teacher = tmp_path_factory.mktemp("teacher") / "run"
    run(teacher, "sft")
    run_dir = tmp_path_factory.mktemp("student") / "run"
    return run_dir, teacher, *run(run_dir, "distill", f"objective.path={teacher}")


@pytest.mark.slow
def test_a_stage_starts_from_another_stages_model(taught, tmp_path):
    _, text = run(tmp_path, "reward", f"init.path={taught[1]}")
    assert f"starting from {taught[1]}" in text
    assert "the reward head is new" in text
    half = ("model.num_layers=1", "init.layers=[1]", "training.steps=1")
    _, text = run(tmp_path / "half", "sft", f"init.path={taught[1]}", *half)
    assert f"starting from {taught[1]}, layers 1 of it" in text


@pytest.mark.slow
def test_under_adapters_the_base_is_the_reference_and_stays_as_it_was(taught, tmp_path):
    settings = (f"init.path={taught[1]}", "adapter.rank=4", "objective.reference=live")
    _, text = run(tmp_path, "dpo", *settings, "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2")
    assert "LoRA adapters of rank 4" in text
    first = told(tmp_path)[0]
    assert first["loss"] == pytest.approx(math.log(2) + 0.2 * first["nll"], abs=1e-6)
    assert (tmp_path / "samples_before.txt").exists()
    # A checkpoint holds what was trained, not what it was trained beside.
    folder = tmp_path / "checkpoints" / "step_4" / "state"
    names = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree
    params = [name for name in names if name.startswith("params.")]
    assert params
    assert all("_lora_" in name for name in params)


@pytest.mark.slow
def test_the_base_under_adapters_may_move_but_not_train_on(taught, tmp_path):
    base, rank = tmp_path / "base", "adapter.rank=4"
    shutil.copytree(taught[1], base)
    run(tmp_path / "run", "sft", f"init.path={base}", rank, "training.steps=2")
    moved = base.rename(tmp_path / "moved")
    _, text = run(tmp_path / "run", "sft", f"init.path={moved}", rank, "training.steps=3")
    assert f"init.path ({str(base)!r} -> {str(moved)!r})" in text
    run(moved, "sft", "training.steps=5")
    with pytest.raises(ConfigError, match=r"^init\.path: .*moved holds another model now"):
        run(tmp_path / "run", "sft", f"init.path={moved}", rank, "training.steps=4")
    # Its readers neither, who would merge it into what it was not trained beside.
    with pytest.raises(InterchangeError, match=r"moved holds another model now .* trained adapter"):
        open_source(tmp_path / "run")
    assert open_adapter(tmp_path / "run").config.rank == 4
    before = moved / "checkpoints" / "step_4"
    run(tmp_path / "run", "sft", f"init.path={before}", rank, "training.steps=4")
    assert open_source(tmp_path / "run").config.num_layers == 2
    # A finished run's config isn't led astray either.
    with pytest.raises(ConfigError, match=r"^init\.path: .*moved holds another model now"):
        run(tmp_path / "run", "sft", f"init.path={moved}", rank, "training.steps=4")
    assert open_source(tmp_path / "run").config.num_layers == 2


@pytest.mark.slow
def test_an_adapter_that_a_run_goes_on_with_is_in_its_reference(taught, tmp_path):
    base = (f"init.path={taught[1]}", "adapter.rank=4", "adapter.alpha=8.0")
    run(tmp_path / "first", "sft", *base, "schedule.peak=3e-2")
    run(tmp_path / "fresh", "dpo", *base)
    again = (*base, f"init.adapter={tmp_path / 'first'}")
    _, text = run(tmp_path / "again", "dpo", *again, "training.steps=2")
    assert f"going on with the adapter of {tmp_path / 'first'}" in text
    first, fresh = told(tmp_path / "again")[0], told(tmp_path / "fresh")[0]
    # The reference is the start, adapter included; against the base alone it would differ.
    assert abs(first["margin"]) < 1e-6
    assert first["loss"] == pytest.approx(math.log(2) + 0.2 * first["nll"], abs=1e-6)
    assert abs(first["nll"] - fresh["nll"]) > 1e-2
    # Log-probabilities that were lost are made again of that start, not of what was trained since.
    stored = tmp_path / "again" / "data" / "sources" / "arithmetic" / "reference_logps.npz"
    with np.load(stored) as found:
        before = found["logps_ER"]
    stored.unlink()
    _, text = run(tmp_path / "again", "dpo", *again)
    assert "under the reference" in text
    with np.load(stored) as found:
        np.testing.assert_allclose(found["logps_ER"], before, rtol=1e-6)
    # Live it is the same, also of a run that has gone on.
    for steps in (2, 4):
        settings = (*again, "objective.reference=live", f"training.steps={steps}")
        run(tmp_path / "live", "dpo", *settings)
    for live, cached in zip(told(tmp_path / "live"), told(tmp_path / "again"), strict=True):
        assert live["step"] == cached["step"]
        if "loss" in live:
            assert live["loss"] == pytest.approx(cached["loss"], rel=1e-5)
            assert live["margin"] == pytest.approx(cached["margin"], abs=1e-5)
    # What was trained since is again one adapter of the base.
    adapter, start = (open_adapter(tmp_path / name) for name in ("again", "first"))
    assert adapter.config == start.config
    name = "layers.0.mlp.up_proj_lora_a"
    moved = np.abs(adapter.tensors[name].read_all() - start.tensors[name].read_all()).max()
    assert 0 < moved < 0.1


@pytest.mark.slow
def test_a_student_is_drawn_to_its_teacher(taught):
    held_out = [r["held_out"] for r in told(taught[0]) if "held_out" in r]
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    assert {"loss", "nll", "tokens"} <= told(taught[0])[0].keys()


@pytest.mark.slow
def test_all_of_a_teachers_tokens_stored_give_the_losses_of_a_live_one(taught, tmp_path):
    settings = (f"objective.path={taught[1]}", "objective.teacher=stored", "objective.top_k=272")
    run(tmp_path, "distill", *settings)
    for stored, live in zip(told(tmp_path), told(taught[0]), strict=True):
        if "loss" in live:
            assert stored["loss"] == pytest.approx(live["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_teacher_of_another_vocabulary_is_refused(taught, tmp_path):
    with pytest.raises(
        ConfigError, match=r"model.vocab_size: the teacher's vocabulary has 272 row"
    ):
        run(tmp_path, "distill", f"objective.path={taught[1]}", "model.vocab_size=280")
