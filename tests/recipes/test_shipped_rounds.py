"""The shipped rounds: found by name, of data that is right, and run whole in few steps."""

import io
import json
import re
import runpy
from pathlib import Path

import pytest
from rich.console import Console

from llama_jax.cli.main import main
from llama_jax.config.files import load_run_config, shipped_configs
from llama_jax.config.loading import ConfigError
from llama_jax.data.files import local_path
from llama_jax.recipes.post_training import first_artifacts, make_stages
from llama_jax.recipes.report import read_rounds
from llama_jax.recipes.rounds import check_stages
from llama_jax.recipes.settings import load_rounds_config
from llama_jax.synthesis.prompts import read_prompts
from llama_jax.training.run import train

ROUNDS = sorted((shipped_configs() / "rounds").glob("*.toml"))
DATA = shipped_configs() / "data"


@pytest.mark.parametrize("path", ROUNDS, ids=lambda p: p.stem)
def test_every_shipped_file_loads_by_name_and_its_stages_fit(path):
    config = load_rounds_config(path.stem)
    assert config == load_rounds_config(path)
    artifacts = first_artifacts(config)
    for number in range(1, config.rounds + 1):
        made = check_stages(make_stages(config, number), artifacts)
        assert {"model", "conversations", "preferences"} <= made
    assert read_prompts(artifacts["prompts"])
    assert read_prompts(artifacts["held_out"])


def test_an_unknown_name_suggests_the_nearest():
    assert [path.stem for path in ROUNDS] == ["arithmetic"]
    with pytest.raises(ConfigError, match=r"arithmetik: no such .*did you mean 'arithmetic'"):
        load_rounds_config("arithmetik")
    with pytest.raises(ConfigError, match=r"'arithmetic_prompt.jsonl' .did you mean"):
        local_path("shipped:arithmetic_prompt.jsonl")
    assert local_path("some/file.jsonl") == Path("some/file.jsonl")


def test_prompts_ask_different_things_and_their_answers_are_right():
    asked = [
        read_prompts(DATA / f"arithmetic_{name}.jsonl") for name in ("prompts", "held_out_prompts")
    ]
    assert [len(prompts) for prompts in asked] == [48, 32]
    problems = [prompt for prompts in asked for prompt in prompts]
    assert len({prompt.request.prompt for prompt in problems}) == 80
    for prompt in problems:
        found = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", prompt.request.prompt)
        a, b = int(found[1]), int(found[3])
        assert prompt.reference["answer"] == (a + b if found[2] == "+" else a - b) >= 0


def test_the_data_is_what_its_script_writes(tmp_path):
    script = runpy.run_path(str(DATA.parents[1] / "benchmarks" / "make_arithmetic.py"))
    script["main"].__globals__["FOLDER"] = tmp_path
    script["main"]()
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == sorted(p.name for p in DATA.glob("arithmetic_*"))
    for path in written:
        assert path.read_bytes() == (DATA / path.name).read_bytes()


@pytest.mark.slow
def test_arithmetic_runs_whole_in_few_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ("training.steps=2", "schedule.warmup_steps=0", "training.sample_prompts=[]")
    start = load_run_config("debug/sft", quick)
    train(start, "runs/sft", Console(file=io.StringIO()))
    few = '[{set = ["training.steps=2", "schedule.warmup_steps=0"]}]'
    settings = [
        *(f"{stage}.variants={few}" for stage in ("sft", "reward", "dpo")),
        *("sample.k=2", "sample.draw.max_new_tokens=8", "compare.draw.max_new_tokens=8"),
    ]
    command = ["rounds", "arithmetic", *(part for s in settings for part in ("--set", s))]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["folder"] == "rounds/arithmetic"
    order = ["sample", "score", "sft", "reward", "dpo", "average", "compare"]
    assert [list(each["stages"]) for each in report["rounds"]] == [order] * 2
    for each in report["rounds"]:
        stages = each["stages"]
        assert stages["sample"]["figures"] == {"prompts": 48, "k": 2}
        assert stages["compare"]["figures"]["matches"] == 32
        losses = stages["average"]["figures"]["losses"]
        assert stages["average"]["figures"]["loss"] <= min(losses.values())
        assert not [name for name, stage in stages.items() if "skipped" in stage]
    # All is done: another call does nothing.
    assert main(command) == 0
    assert capsys.readouterr().err.count(": done already") == 14
    assert read_rounds(tmp_path / "rounds/arithmetic") == report["rounds"]
