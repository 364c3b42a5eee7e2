"""The benchmark beside TRL at toy size: all sides compute the same; what is missing is said."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = """
vocab_size = 300
embed_dim = 32
num_layers = 1
num_heads = 2
num_kv_heads = 1
head_dim = 16
mlp_dim = 64
max_seq_len = 16
norm_eps = 1e-5
tie_embeddings = true
rope = { theta = 10000.0 }
"""
HAS_TRL = all(importlib.util.find_spec(name) for name in ("trl", "accelerate", "datasets"))


def benchmark(folder, *options):
    (folder / "tiny.toml").write_text(TINY)
    script = ROOT / "benchmarks" / "post_training_beside_trl.py"
    shape = ("--model", str(folder / "tiny.toml"), "--seq-len", "16", "--repeats", "1", "--json")
    command = [sys.executable, str(script), *shape, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


@pytest.mark.slow
@pytest.mark.skipif(HAS_TRL, reason="trl is installed")
def test_without_trl_it_is_said_what_to_install_and_ours_is_measured(tmp_path):
    done = benchmark(tmp_path, "--stages", "dpo", "--engines", "trl")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("trl is left out; pip install ")
    assert "trl" in done.stderr.splitlines()[0].partition("pip install")[2].split()
    ((ours,),) = [found["sides"] for found in json.loads(done.stdout)["results"]]
    assert ours["engine"] == "llama_jax"
    assert 0 < ours["step_s"] < 60
    assert ours["first_loss"] > ours["last_loss"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRL, reason="trl is not installed")
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_losses_of_all_sides_stay_together_over_the_steps(tmp_path, reference):
    done = benchmark(tmp_path, "--reference", reference)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout)["results"]:
        ours, *others = found["sides"]
        assert others
        for side in others:
            assert side["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-5)
            assert side["last_loss"] == pytest.approx(ours["last_loss"], rel=1e-4)


def test_an_odd_number_of_sequences_is_refused(tmp_path):
    done = benchmark(tmp_path, "--sequences", "3")
    assert done.returncode == 2
    assert "--sequences: DPO takes them in pairs" in done.stderr
