"""Runs in this process: what they leave behind, how they go on, and what they refuse."""

import io
import json
import math
import types

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError, fingerprint
from llama_jax.config.run import ExecutionConfig, NextTokenConfig
from llama_jax.metrics.records import read_records
from llama_jax.models.init import make_model
from llama_jax.objectives.objective import make_objective
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.training import loop
from llama_jax.training.held_out import evaluate
from llama_jax.training.loop import TrainingError
from llama_jax.training.networks import Networks
from llama_jax.training.run import train
from llama_jax.training.samples import sample_text
from llama_jax.training.state import init_state
from llama_jax.training.stopping import StopRequest

SETTINGS = (
    "model.embed_dim=32",
    "model.mlp_dim=64",
    "data.seq_len=32",
    "data.sources.0.text.max_bytes=20000",
    "data.held_out.0.text.max_bytes=4000",
    "schedule.warmup_steps=2",
    "training.steps=6",
    "training.eval_every=2",
    "training.eval_batches=2",
    "training.sample_tokens=4",
    "checkpoint.every=2",
    "hardware.slice=v5p-16",
)


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv(loop.RECOMPILATION_VARIABLE, "error")


def config_with(*settings):
    return load_run_config("tiny", [*SETTINGS, *settings])


def run(run_dir, *settings):
    text = io.StringIO()
    outcome = train(config_with(*settings), run_dir, Console(file=text, width=200))
    return outcome, text.getvalue()


def stop_at(monkeypatch, step):
    def wanted(self, now):
        if now == step:
            self.signal_number = 15
        return self.signal_number is not None

    monkeypatch.setattr(StopRequest, "wanted", wanted)


def told(run_dir):
    """All records without what depends on the clock."""
    clock = ("tokens_per_s", "goodput")
    records = read_records(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    return run_dir, *run(run_dir)


def test_a_run_leaves_everything_in_its_directory(finished):
    run_dir, outcome, _ = finished
    assert outcome.exit_code == 0
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_4", "step_6"]
    for name in ("tokenizer", "data", "tensorboard", "plots/loss.png", "samples.txt"):
        assert (run_dir / name).exists(), name
    described = json.loads((run_dir / "run.json").read_text())
    assert described["fingerprint"] == fingerprint(config_with())
    assert described["starts"][0]["versions"]["jax"] == jax.__version__
    assert load_run_config(str(run_dir / "config.toml")) == config_with()
    assert json.loads((run_dir / "result.json").read_text()) == outcome.figures
    assert (run_dir / "samples.txt").read_text().count("--- sample") == 2


def test_a_run_on_other_devices_than_it_was_made_for_says_so(finished):
    text = finished[2]
    assert "hardware: made for 1 x v5p-16 (8 devices TPU v5), runs on 8 devices cpu" in text


@pytest.mark.short
def test_every_step_is_recorded_once_and_every_evaluation(finished):
    records = read_records(finished[0] / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "held_out" in r] == [2, 4, 6]
    assert {"tokens", "grad_norm", "param_norm", "learning_rate", "goodput"} <= records[0].keys()
    # Untrained, all 272 tokens are about as likely (a tied head favours the token itself, and
    # spaces follow spaces): a broken head or mask would show here.
    assert records[0]["loss"] == pytest.approx(math.log(272), abs=0.25)
    assert records[-1]["held_out"]["loss"] < records[0]["loss"]


def test_a_finished_run_says_that_it_is_done_and_does_nothing(finished):
    run_dir, first, _ = finished
    before = told(run_dir)
    outcome, _ = run(run_dir)
    assert outcome.already_done
    assert outcome.figures == json.loads(json.dumps(first.figures))
    assert told(run_dir) == before


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4])
def test_a_stopped_run_goes_on_with_the_same_losses_and_rates(
    finished, tmp_path, monkeypatch, step
):
    with monkeypatch.context() as patched:
        stop_at(patched, step)
        outcome, _ = run(tmp_path)
    assert (outcome.exit_code, outcome.step, outcome.figures) == (143, step, None)
    assert told(tmp_path)[-1]["step"] == step
    outcome, text = run(tmp_path)
    assert f"going on from the checkpoint of step {step}" in text
    assert told(tmp_path) == told(finished[0])
    # A notebook that counts starts sees both.
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 2


def test_a_contradicting_config_is_refused_and_an_allowed_change_is_told(finished, tmp_path):
    run_dir, _, _ = finished
    with pytest.raises(ConfigError, match=r"schedule\.peak \(0\.003 -> 0\.1\) contradicts"):
        run(run_dir, "schedule.peak=0.1")
    with pytest.raises(ConfigError, match=r"training\.steps: 5 is below the 6 steps already done"):
        run(run_dir, "training.steps=5", "training.eval_every=3")
    # The refusals have changed nothing.
    assert load_run_config(str(run_dir / "config.toml")) == config_with()


@pytest.mark.slow
def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    settings = ("schedule.peak=1e38", "schedule.warmup_steps=0", "training.max_skipped_steps=2")
    with pytest.raises(TrainingError, match="not finite in 2 steps in a row, up to step 3"):
        run(tmp_path, *settings, "training.eval_every=100")
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [0, 1, 1]


def test_a_model_with_a_smaller_vocabulary_than_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.vocab_size: 128 .* 272"):
        run(tmp_path, "model.vocab_size=128")


def test_a_second_compilation_is_an_error_in_tests_and_a_warning_to_users(monkeypatch):
    once, twice = (types.SimpleNamespace(compilations=n) for n in (1, 2))
    loop._check_compiled_once(once)
    with pytest.raises(TrainingError, match="compiled 2 times"):
        loop._check_compiled_once(twice)
    monkeypatch.delenv(loop.RECOMPILATION_VARIABLE)
    with pytest.warns(UserWarning, match="compiled 2 times"):
        loop._check_compiled_once(twice)


def test_held_out_loss_is_weighted_by_token_and_bits_by_bytes():
    rows = np.zeros((8, 4), np.int32)
    batches = [({"tokens": rows}, 30.0), ({"tokens": rows}, 2.0)]
    sums = iter([
        {"cross_entropy": 60.0, "tokens": 30.0, "loss": 99.0},
        {"cross_entropy": 10.0, "tokens": 2.0, "loss": 99.0},
    ])  # fmt: skip
    mesh = make_mesh(config_with().mesh)
    objective = make_objective(NextTokenConfig(), ExecutionConfig())
    state = types.SimpleNamespace(params={}, averaged={}, frozen={})
    figures = evaluate(state, lambda *_: next(sums), objective, lambda: iter(batches), mesh)
    assert figures.loss == pytest.approx(70 / 32)
    assert figures.bits_per_byte == pytest.approx(70 / math.log(2) / 32)
    assert (figures.tokens, figures.text_bytes) == (32, 32)


@pytest.mark.slow
def test_greedy_samples_are_what_full_forwards_of_each_length_give():
    config, tokenizer = config_with(), ByteTokenizer()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    prompts = ["def f", "import numpy as"]
    with jax.set_mesh(mesh):
        model = make_model(config.model, config.execution, mesh, seed=3)
        graphdef, params = nnx.split(model)
        state = init_state(params, optax.sgd(1.0), jax.random.key(0))
        texts = sample_text(
            Networks(graphdef), state, tokenizer, prompts, new_tokens=2, max_seq_len=64,
            temperature=0.0, key=jax.random.key(0), mesh=mesh,
        )  # fmt: skip
        forward = jax.jit(
            lambda params, tokens_BT, positions_BT: nnx.merge(graphdef, params)(
                tokens_BT, positions_BT=positions_BT, segment_ids_BT=tokens_BT * 0 + 1
            )
        )
        for prompt, text in zip(prompts, texts, strict=True):
            ids = tokenizer.encode(prompt, bos=True)
            for _ in range(2):
                logits_BTV = forward(params, np.int32([ids]), np.arange(len(ids))[None])
                ids.append(int(np.asarray(logits_BTV)[0, -1].argmax()))
            assert text == tokenizer.decode(ids[1:])
