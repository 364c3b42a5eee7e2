"""Runs of several real processes: other numbers of them, and the ends that one makes for all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

STEPS = 12
SMALL = [
    f"training.steps={STEPS}",
    "training.sample_prompts=[]",
    "schedule.warmup_steps=4",
    "checkpoint.every=4",
    "checkpoint.keep_last=2",
    "metrics.tensorboard=false",
    "metrics.progress=false",
    "data.sources.0.text.max_bytes=60000",
    "data.held_out=[]",
]
# The order of float32 sums differs between meshes; over 12 updates the losses drift by this much.
FLOAT32_NOISE = 2e-4
# How soon the others end when a process dies whose connections break, on a busy machine.
STOP_S = 30
# During a save all wait where no connection is: only missing heartbeats tell that one is dead.
DEAD_AFTER_S = 20
HEARTBEATS = {"LLAMA_JAX_DEAD_AFTER_S": str(DEAD_AFTER_S)}


class Job:
    """Processes of one run with 8 devices in all."""

    def __init__(self, run_dir, processes, *, settings=(), own=None, variables=None):
        self.run_dir, self.logs = run_dir, []
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.processes = []
        for number in range(processes):
            command = [sys.executable, "-m", "llama_jax.cli.main", "train", "tiny"]
            command += ["--run-dir", str(run_dir)]
            if processes > 1:
                command += ["--coordinator", f"localhost:{port}"]
                command += ["--num-processes", str(processes), "--process-id", str(number)]
            for setting in (*SMALL, *settings, *((own or {}).get(number, []))):
                command += ["--set", setting]
            environment = {
                **os.environ,
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}",
                "JAX_PLATFORMS": "cpu",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "LLAMA_JAX_ON_RECOMPILATION": "error",
                **(variables or {}),
            }
            log = run_dir.parent / f"{run_dir.name}.{number}.log"
            self.logs.append(log)
            with log.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=out)
                )

    def wait_for_step(self, step):
        while last_step(self.run_dir) < step:
            assert all(process.poll() is None for process in self.processes), self.ends()
            time.sleep(0.02)

    def finish(self, *codes):
        """Wait for all, and expect these exit codes."""
        found = [process.wait(timeout=300) for process in self.processes]
        assert found == list(codes), self.ends()

    def ends(self):
        """The last line of each log."""
        return [log.read_text().strip().splitlines()[-1:] for log in self.logs]

    def last_line(self, number):
        return self.logs[number].read_text().strip().splitlines()[-1]

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def job(tmp_path):
    """Starts the processes of a run in this test's folder; none outlives the test."""
    jobs = []

    def start(processes, **options):
        jobs.append(Job(tmp_path / "run", processes, **options))
        return jobs[-1]

    yield start
    for started in jobs:
        started.end()


def records(run_dir):
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run_dir):
    return max((record["step"] for record in records(run_dir)), default=0)


def losses(run_dir):
    found = [(r["step"], r["loss"], r["tokens"]) for r in records(run_dir) if "loss" in r]
    assert [step for step, _, _ in found] == list(range(1, len(found) + 1))
    return found


def saved_steps(run_dir):
    return sorted(int(p.name.removeprefix("step_")) for p in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process with 8 devices, uninterrupted."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    Job(run_dir, 1).finish(0)
    found = losses(run_dir)
    assert len(found) == STEPS
    return found


def assert_same(found, expected):
    assert [(step, tokens) for step, _, tokens in found] == [(s, t) for s, _, t in expected]
    np.testing.assert_allclose(
        [loss for _, loss, _ in found], [loss for _, loss, _ in expected], rtol=FLOAT32_NOISE
    )


def test_2_processes_stop_together_at_one_sigterm_and_4_go_on_to_the_same_losses(job, alone):
    two = job(2)
    two.wait_for_step(3)
    two.processes[1].send_signal(signal.SIGTERM)
    two.finish(143, 143)
    stopped = last_step(two.run_dir)
    assert 3 <= stopped < STEPS
    assert saved_steps(two.run_dir)[-1] == stopped
    four = job(4, settings=["mesh.fsdp=4", "mesh.tensor=2"])
    four.finish(0, 0, 0, 0)
    assert f"going on from the checkpoint of step {stopped}" in four.logs[0].read_text()
    assert_same(losses(four.run_dir), alone)


def assert_says_that_another_is_gone(line):
    assert line.startswith("llama-jax: error: ")
    assert "another process of this run is gone" in line
    assert "the same command on all of them goes on from the last checkpoint" in line


def test_when_one_of_4_is_killed_the_others_end_soon_and_2_go_on_to_the_same_losses(job, alone):
    four = job(4, variables=HEARTBEATS)
    four.wait_for_step(4)  # whose checkpoint is being saved, or has just been
    four.processes[2].kill()
    killed_s = time.monotonic()
    four.finish(1, 1, -signal.SIGKILL, 1)
    assert time.monotonic() - killed_s < DEAD_AFTER_S + STOP_S
    for number in (0, 1, 3):
        assert_says_that_another_is_gone(four.last_line(number))
    two = job(2)
    two.finish(0, 0)
    assert_same(losses(two.run_dir), alone)


def test_when_the_process_that_coordinates_is_killed_the_other_ends_as_soon(job):
    two = job(2)
    two.wait_for_step(2)
    two.processes[0].kill()  # the heartbeats go to this one: its connections break
    killed_s = time.monotonic()
    two.finish(-signal.SIGKILL, 1)
    assert time.monotonic() - killed_s < STOP_S
    assert_says_that_another_is_gone(two.last_line(1))


def test_a_process_that_only_falls_silent_is_missed_in_the_time_that_is_set(job):
    # As a machine that vanishes: no connection breaks, and the others hang in a collective.
    two = job(2, variables=HEARTBEATS)
    two.wait_for_step(3)
    two.processes[1].send_signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    assert two.processes[0].wait(timeout=120) == 1
    assert time.monotonic() - stopped_s < DEAD_AFTER_S + STOP_S
    assert_says_that_another_is_gone(two.last_line(0))


def test_a_process_that_fails_tells_the_others_why(job):
    two = job(2, own={1: ["data.sources.0.text.path=/nowhere"]})
    two.finish(1, 2)
    assert "/nowhere" in two.last_line(1)
    line = two.last_line(0)
    assert line.startswith("llama-jax: error: process 1 on ")
    assert "/nowhere" in line
    assert line.endswith("; this process ends too")
