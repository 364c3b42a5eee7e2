"""The wheel carries the configs: installed alone in an empty environment, it trains."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_every_config_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"llama_jax/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.*")}
    assert len(configs) >= 20
    assert configs <= inside


@pytest.mark.slow
def test_an_installed_wheel_finds_models_by_name_and_trains_two_steps(wheel, tmp_path):
    version = "py311" if sys.version_info < (3, 12) else "py312"
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    constraints = ROOT / "constraints" / f"{version}.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", constraints, wheel)

    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    found = "from llama_jax.config.files import *; print(load_model_config('llama3.1-8b').mlp_dim)"
    assert run(python, "-c", found, cwd=tmp_path, env=clean).strip() == "14336"

    command = [tmp_path / "env" / "bin" / "llama-jax", "train", "tiny", "--run-dir", "run"]
    overrides = ["--set", "training.steps=2", "--set", "schedule.warmup_steps=0"]
    run(*command, *overrides, cwd=tmp_path, env=clean)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]
    assert steps == [1, 2]
