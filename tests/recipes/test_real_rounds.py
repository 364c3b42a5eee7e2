"""One round of real stages at toy size: SFT, sampling, reward model, DPO, average, comparison."""

import sys
from pathlib import Path

import pytest

from llama_jax.config.files import load_run_config
from llama_jax.recipes.post_training import run_post_training
from llama_jax.recipes.report import read_rounds
from llama_jax.recipes.settings import load_rounds_config

sys.path.append(str(Path(__file__).parents[1] / "interchange"))

from in_memory import random_source

from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.opening import open_source
from llama_jax.tokenizers.byte import ByteTokenizer

pytestmark = pytest.mark.slow

STEPS = '"training.steps=2", "schedule.warmup_steps=0", "training.eval_batches=1"'
OWN = '"data.sources.0.preferences.path=@preferences", "data.sources.0.preferences.part=all"'
ROUNDS = f"""
start = "start"
prompts = ["prompts.txt"]
held_out = "held_out.txt"
rounds = 2
stages = ["sft", "sample", "score", "reward", "dpo", "average", "compare"]
model = {{ chat_format = "llama3" }}
sample = {{ k = 4, draw = {{ temperature = 1.0, max_new_tokens = 12 }} }}
sft = {{ run = "sft", set = ["init.path=@start", {STEPS}] }}
reward = {{ run = "reward", set = ["init.path=@start", {OWN}, {STEPS}] }}
dpo = {{ run = "dpo", set = ["init.path=@model", {OWN}, {STEPS}] }}
average = {{ of = ["sft_1", "dpo_1"] }}

[score]
# Of every second letter as the last: half right and half wrong, whatever was learned.
verifiers = [{{ kind = "pattern", pattern = '([acegikmoqsuwy13579]|[^\\x00-\\x7f])$' }}]
keep = {{ truncated = true }}

[compare]
judge = "reward"
draw = {{ temperature = 1.0, max_new_tokens = 8 }}
"""


def test_two_rounds_of_every_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_run_config("sft").model
    write_hugging_face(random_source(config), tmp_path / "start", tokenizer=ByteTokenizer())
    (tmp_path / "prompts.txt").write_text("".join(f"question {i}\n" for i in range(12)))
    (tmp_path / "held_out.txt").write_text("".join(f"another {i}\n" for i in range(5)))
    (tmp_path / "rounds.toml").write_text(ROUNDS)
    loaded = load_rounds_config(tmp_path / "rounds.toml")
    artifacts = run_post_training(loaded, tmp_path / "rounds")
    first, second = (each["stages"] for each in read_rounds(tmp_path / "rounds"))
    assert list(first) == list(second) == list(loaded.order)
    for each in (first, second):
        assert each["score"]["figures"]["pairs"] >= 4
    # The first round scores by the verifier alone, the second by the first's reward model too.
    assert "scores" not in first["score"]["figures"]
    assert len(second["score"]["figures"]["scores"]["best_of"]) == 4
    for stages in (first, second):
        assert 0 <= stages["compare"]["figures"]["rate"] <= 1
        assert stages["compare"]["figures"]["matches"] == 5
    assert open_source(artifacts["model"]).config == config
    assert open_source(artifacts["reward_model"]).config.head == "scalar"
