"""A run whose file names another as `run:NAME` has it trained first, once."""

import io
import json
from pathlib import Path

import pytest
from etils import epath
from rich.console import Console

from llama_jax.config.files import load_run_config, shipped_configs
from llama_jax.config.loading import ConfigError
from llama_jax.interchange.opening import open_adapter, open_source
from llama_jax.interchange.tensors import InterchangeError
from llama_jax.training import needed_runs
from llama_jax.training.run import Outcome, train

SFT = (shipped_configs() / "runs" / "debug" / "sft.toml").resolve()
NAMES = ("first", "second", "third")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(name, needed=None):
    init = "" if needed is None else f'init = {{ path = "run:{needed}" }}'
    Path(name).write_text(f"""
        base = "{SFT}"
        {init}
        training = {{ steps = 2, sample_prompts = [] }}
        schedule = {{ warmup_steps = 0 }}
    """)


def started(name):
    return len(json.loads(Path(f"runs/{name}/run.json").read_text())["starts"])


def train_needed(*checkpoints):
    """What it returned, and what it said."""
    console = Console(file=io.StringIO(), width=200)
    outcome = needed_runs.train_needed(checkpoints, console)
    return outcome, console.file.getvalue()


def test_what_a_run_needs_is_trained_first_and_once(folder):
    write_run("first.toml")
    write_run("second.toml", "first.toml")
    write_run("third.toml", "second.toml")
    outcome, said = train_needed("run:third.toml")
    assert outcome is None
    makes = [f"first {name}.toml, whose model is needed: into runs/{name}" for name in NAMES]
    places = [said.index(line) for line in makes]
    assert places == sorted(places)
    assert said.index(makes[2]) < said.index("starting from run:second.toml")
    assert open_source("run:third.toml").path == open_source("runs/third").path

    assert train_needed("run:second.toml", "run:third.toml") == (None, "")
    assert [started(name) for name in NAMES] == [1, 1, 1]


def test_one_that_has_begun_goes_on_by_its_own_config_to_its_own_end(folder):
    write_run("first.toml")
    longer = load_run_config("first.toml", ["training.steps=3", "schedule.peak=1e-3"])
    console = Console(file=io.StringIO())
    train(longer, "runs/first", console)
    assert train_needed("run:first.toml") == (None, "")
    # As a run is left that was to be longer and was killed: the figures are those of its first end.
    text = Path("runs/first/config.toml").read_text()
    Path("runs/first/config.toml").write_text(text.replace("steps = 3", "steps = 4"))
    outcome, said = train_needed("run:first.toml")
    assert outcome is None
    assert "going on from the checkpoint of step 3" in said
    assert open_source("run:first.toml").path.name == "step_4"


def test_a_run_that_needs_itself_is_refused(folder):
    write_run("a.toml", "b.toml")
    write_run("b.toml", "a.toml")
    with pytest.raises(ConfigError, match=r"^a\.toml: needs itself: a\.toml -> b\.toml -> a\.toml"):
        train_needed("run:a.toml")
    assert not (folder / "runs").exists()


def test_one_that_a_signal_stops_stops_what_needs_it(folder, monkeypatch):
    write_run("first.toml")
    write_run("second.toml", "first.toml")
    trained = []

    def stopped(config, run_dir, console):
        trained.append(str(run_dir))
        return Outcome(epath.Path(run_dir), 1, None, exit_code=143)

    monkeypatch.setattr(needed_runs, "train", stopped)
    outcome, _ = train_needed("hf", "run:second.toml")
    assert outcome.exit_code == 143
    assert trained == ["runs/first"]


@pytest.mark.parametrize("opened", [open_source, open_adapter])
def test_where_it_is_not_trained_the_line_says_how(folder, opened):
    with pytest.raises(InterchangeError, match=r"runs/sft: no such .*`llama-jax train debug/sft`"):
        opened("run:debug/sft")
