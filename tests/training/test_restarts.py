"""Whole runs as processes: killed, stopped, moved to another mesh, spread over two processes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

pytestmark = pytest.mark.slow

STEPS = 60
SMALL = [
    f"training.steps={STEPS}",
    "training.eval_every=10",
    "training.eval_batches=1",
    "training.sample_prompts=[]",
    "checkpoint.every=3",
    "metrics.tensorboard=false",
    "data.sources.0.text.max_bytes=60000",
    "data.held_out.0.text.max_bytes=4000",
]
# The order of float32 sums differs between meshes; over 60 updates the losses drift by this much.
FLOAT32_NOISE = 2e-4


def start(run_dir, *, devices=8, settings=(), extra=()):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "LLAMA_JAX_ON_RECOMPILATION": "error",
    }
    command = [sys.executable, "-m", "llama_jax.cli.main", "train", "tiny"]
    command += ["--run-dir", str(run_dir), *extra]
    for setting in (*SMALL, *settings):
        command += ["--set", setting]
    with (Path(run_dir).parent / f"{Path(run_dir).name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish(process, expected=0):
    assert process.wait(timeout=600) == expected


def records(run_dir):
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run_dir):
    return [(r["step"], r["loss"], r["tokens"]) for r in records(run_dir) if "loss" in r]


def last_step(run_dir):
    return max((record["step"] for record in records(run_dir)), default=0)


def wait_for_step(process, run_dir, step):
    while last_step(run_dir) < step and process.poll() is None:
        time.sleep(0.003)


def final_state(run_dir, step=STEPS):
    folder = Path(run_dir).resolve() / "checkpoints" / f"step_{step}" / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata.tree
        target = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in metadata.items()}
        return checkpointer.restore(folder, target)


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        a, b = np.asarray(left[name]), np.asarray(right[name])
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes(), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(start(run_dir))
    return run_dir


def test_a_run_killed_at_20_random_moments_ends_bit_equal_to_the_uninterrupted(
    uninterrupted, tmp_path
):
    chance = random.Random(0)
    run_dir = tmp_path / "killed"
    # Most at a step, where every third one has a save under way; a few while it is starting.
    targets = sorted(chance.randrange(1, STEPS - 2) for _ in range(17)) + [None] * 3
    kills = saves_under_way = 0
    for target in targets:
        process = start(run_dir)
        if target is None:
            time.sleep(chance.uniform(0.5, 6.0))
        else:
            wait_for_step(process, run_dir, target)
            time.sleep(chance.uniform(0.0, 0.05))
        kills += process.poll() is None
        process.kill()
        process.wait()
        if (run_dir / "checkpoints").exists():
            # A name that doesn't end in a number, or no mark of completeness: half a checkpoint.
            folders = list((run_dir / "checkpoints").iterdir())
            whole = [p for p in folders if (p / "commit_success.txt").exists()]
            saves_under_way += any(p.name.startswith("step_") for p in set(folders) - set(whole))
    # One that came too late found the run done; the last three start from step 57 or so.
    assert kills >= 17
    print(f"{kills} kills, {saves_under_way} of them with a save under way")
    finish(start(run_dir))
    assert losses(run_dir) == losses(uninterrupted)
    assert [r["step"] for r in records(run_dir) if "loss" in r] == list(range(1, STEPS + 1))
    assert [r for r in records(run_dir) if "held_out" in r] == [
        r for r in records(uninterrupted) if "held_out" in r
    ]
    assert_bit_equal(final_state(run_dir), final_state(uninterrupted))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_and_the_run_goes_on_with_4_devices_on_another_mesh(
    uninterrupted, tmp_path, number
):
    run_dir = tmp_path / "moved"
    # Slowed by evaluations, so that the signal comes before the end; no save but the signal's.
    settings = ["checkpoint.every=1000"]
    process = start(run_dir, settings=settings)
    wait_for_step(process, run_dir, 5)
    process.send_signal(number)
    finish(process, expected=128 + number)
    (folder,) = (run_dir / "checkpoints").iterdir()
    stopped = int(folder.name.removeprefix("step_"))
    assert 5 <= stopped < STEPS
    assert last_step(run_dir) == stopped
    finish(start(run_dir, devices=4, settings=["mesh.fsdp=2", "mesh.tensor=2"]))
    moved, still = losses(run_dir), losses(uninterrupted)
    assert [(step, tokens) for step, _, tokens in moved] == [
        (step, tokens) for step, _, tokens in still
    ]
    assert moved[:stopped] == still[:stopped]
    np.testing.assert_allclose(
        [loss for _, loss, _ in moved], [loss for _, loss, _ in still], rtol=FLOAT32_NOISE
    )


def test_two_processes_with_4_devices_each_have_the_losses_of_one_with_8(uninterrupted, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run_dir = tmp_path / "two"
    together = [
        start(run_dir, devices=4, extra=["--coordinator", f"localhost:{port}",
              "--num-processes", "2", "--process-id", str(number)])
        for number in range(2)
    ]  # fmt: skip
    for process in together:
        finish(process)
    two, one = losses(run_dir), losses(uninterrupted)
    assert [(step, tokens) for step, _, tokens in two] == [(s, tokens) for s, _, tokens in one]
    np.testing.assert_allclose(
        [loss for _, loss, _ in two], [loss for _, loss, _ in one], rtol=FLOAT32_NOISE
    )
