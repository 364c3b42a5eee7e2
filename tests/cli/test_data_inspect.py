import json
from pathlib import Path

import pytest

from llama_jax.cli.main import main
from llama_jax.config.run_files import default_run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Where the first test tokenises the text, for the others to find."""
    return str(tmp_path_factory.mktemp("run"))


def inspect(run_dir, *options):
    return main(["data", "inspect", "tiny", "--run-dir", run_dir, *options])


def test_rows_of_a_step_are_shown(run_dir, capsys):
    assert inspect(run_dir, "--step", "3", "--rows", "2") == 0
    output = capsys.readouterr().out
    assert "step 3, row 0 of 8" in output
    assert "step 3, row 1 of 8" in output
    assert "2 rows of 64: 128 tokens" in output


def test_a_changed_field_reaches_the_batch(run_dir, capsys):
    assert inspect(run_dir, "--json", "--set", "data.seq_len=16", "--rows", "99") == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in table["rows"]] == list(range(8))
    assert {len(row["tokens"]) for row in table["rows"]} == {16}
    first = table["rows"][0]["documents"][0]
    assert (first["source"], first["segment"]) == ("stdlib", 1)
    assert first["places"][0] == 0


def test_a_step_below_0_is_a_bad_argument(run_dir, capsys):
    assert inspect(run_dir, "--step", "-1") == 2
    assert capsys.readouterr().err == "llama-jax: error: step: -1 is below 0\n"


def test_the_config_in_a_run_directory_is_inspected_where_it_is(tmp_path):
    (tmp_path / "config.toml").touch()
    assert default_run_dir(str(tmp_path / "config.toml")) == Path("runs/config")
    (tmp_path / "run.json").touch()
    assert default_run_dir(str(tmp_path / "config.toml")) == tmp_path
    assert default_run_dir("quickstart") == Path("runs/quickstart")
    for name in ("sft/llama3.2-1b-v5e-1", "configs/runs/sft/llama3.2-1b-v5e-1.toml"):
        assert default_run_dir(name) == Path("runs/llama3.2-1b-v5e-1")
