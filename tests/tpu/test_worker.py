"""worker.sh, which runs on the VMs, run here for real: one detached command and its state."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[2] / "tpu" / "worker.sh"


@pytest.fixture
def worker(tmp_path):
    job = tmp_path / "job"

    def call(*arguments):
        environment = {**os.environ, "LLAMA_JAX_JOB": str(job), "LLAMA_JAX_STOP_S": "5"}
        return subprocess.run(
            ["bash", str(WORKER), *arguments],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    call.job = job
    yield call
    call("stop")


def state(worker):
    return worker("state").stdout.strip()


def wait_for(worker, expected):
    for _ in range(100):
        if state(worker) == expected:
            return
        time.sleep(0.05)
    assert state(worker) == expected


def kill(worker):
    """All of the command's session, once it has one."""
    pid = int((worker.job / "pid").read_text())
    for _ in range(100):
        if os.getpgid(pid) == pid:
            break
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)


def test_the_state_goes_from_absent_to_running_to_the_exit_code(worker):
    assert state(worker) == "absent"
    assert (
        worker("start", "bash", "-c", "echo hello 'two  words'; sleep 0.5; exit 7").returncode == 0
    )
    assert state(worker) == "running"
    second = worker("start", "true")
    assert second.returncode == 1
    assert "a command is running already" in second.stderr
    wait_for(worker, "exited 7")
    assert "hello two  words" in worker("log").stdout
    # Another may start now, and has its own code.
    assert worker("start", "true").returncode == 0
    wait_for(worker, "exited 0")


def test_stop_asks_the_command_to_end_and_its_code_is_kept(worker):
    worker(
        "start", "bash", "-c", "trap 'echo saved; exit 143' TERM; while true; do sleep 0.05; done"
    )
    assert state(worker) == "running"
    time.sleep(0.3)
    assert worker("stop").returncode == 0
    wait_for(worker, "exited 143")
    assert "saved" in worker("log").stdout
    assert worker("stop").returncode == 0


def test_a_killed_machine_or_a_reboot_counts_as_killed(worker):
    worker("start", "sleep", "60")
    kill(worker)
    wait_for(worker, "exited 137")
    worker("start", "sleep", "60")
    assert state(worker) == "running"
    (worker.job / "boot").write_text("another\n")
    assert state(worker) == "exited 137"
    kill(worker)


def test_an_unknown_verb_is_told(worker):
    done = worker("begin")
    assert done.returncode == 2
    assert "usage: tpu/worker.sh" in done.stderr
