"""`llama-jax train` and `doctor` as commands: exit codes, and what stands on which stream."""

import json
import os
import subprocess
import sys

import pytest

FEW = [
    "training.steps=3", "training.eval_every=3", "training.eval_batches=1",
    "training.sample_tokens=2", "schedule.warmup_steps=1",
    "data.sources.0.text.max_bytes=20000", "data.held_out.0.text.max_bytes=4000",
]  # fmt: skip


def llama_jax(*arguments):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    return subprocess.run(
        [sys.executable, "-m", "llama_jax.cli.main", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.short
def test_train_runs_says_where_all_is_and_a_second_call_that_it_is_done(tmp_path):
    settings = [part for setting in FEW for part in ("--set", setting)]
    command = ["train", "tiny", "--run-dir", str(tmp_path / "run"), *settings]
    done = llama_jax(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cpu, 1 device (cpu), 1 process, jax ")
    for line in (
        "held-out bits a byte, gzip -9, files joined",
        "samples.txt",
        "next:",
        "generate --model",
    ):
        assert line in done.stdout
    again = llama_jax(*command, "--json")
    assert again.returncode == 0
    assert "this run is done: step 3 of 3" in again.stderr
    printed = json.loads(again.stdout)
    assert printed["step"] == printed["figures"]["step"] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "tinny"], 2, "did you mean 'tiny'?"),
        (["train", "tiny", "--set", "training.stpes=3"], 2, "did you mean 'steps'?"),
        (["train", "tiny", "--num-processes", "2"], 2, "go together"),
        (["train", "tiny", "--set", "mesh.tensor=7"], 2, "7"),
        (["train", "tiny", "--platform", "tpu"], 1, "platform 'tpu' was asked for and isn't there"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_run_is_one_line_and_a_code(tmp_path, arguments, code, message):
    if arguments[0] == "train":
        arguments = [*arguments, "--run-dir", str(tmp_path / "run")]
    done = llama_jax(*arguments)
    assert done.returncode == code
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("llama-jax: error: ")
    assert message in last


@pytest.mark.slow
def test_doctor_prints_facts_and_findings_as_json():
    done = llama_jax("doctor", "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == (1 if facts["findings"] else 0)
    assert [device["platform"] for device in facts["devices"]] == ["cpu"]
    assert facts["versions"]["python"].startswith("3.")
