"""Running a Python program apart: a process of its own with limits on time, memory and network.

What is isolated: wall and CPU time, the memory of each process, the size of each file written, the
network (a namespace of its own, with nothing in it), other processes (not seen, and all that the
program starts die with it), the environment (not handed on), standard input.
What is not: files. The program reads and writes what this user may. It can exhaust memory by
starting many processes, and a program that looks into its own interpreter can forge the mark of
having passed. So it is made for programs that are wrong, not for programs that attack.
"""

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from llama_jax.config.loading import Positive, check_ranges
from llama_jax.synthesis.prompts import SynthesisError

_RUNNER = Path(__file__).with_name("isolated_program.py")
# Beside the program's own time: an interpreter starts and namespaces are made.
_START_S = 2.0
_MIB = 2**20

Ending = Literal["finished", "raised", "ended_early", "timed_out", "out_of_memory", "killed"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one program.

    Attributes:
      timeout_s: of wall time, from when the program itself begins; CPU time likewise.
      memory_mib: address space of each process.
      file_mib: the most that one file may become.
      network: leave it its network; otherwise a machine that can't take it away is refused.
    """

    timeout_s: Annotated[float, Positive] = 5.0
    memory_mib: Annotated[int, Positive] = 1024
    file_mib: Annotated[int, Positive] = 16
    network: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a program ended, and one line about it; `finished` is that it ran to its last line."""

    ending: Ending
    detail: str


def run_apart(program: str, limits: Limits) -> Execution:
    """Run a Python program in a folder of its own, which is removed afterwards.

    Raises:
      SynthesisError: it can't be kept from the network on this machine, though it should be.
    """
    if not limits.network and not can_isolate():
        raise SynthesisError(
            "this machine doesn't let a process give up its network (no user namespaces); programs "
            "can be run with `network = true`, on the network and unseen by none"
        )
    return _run(program, limits, apart=can_isolate())


@functools.cache
def can_isolate() -> bool:
    """Whether a process can be put into namespaces of its own here: Linux, with user namespaces."""
    if sys.platform != "linux":
        return False
    return _run("pass", Limits(timeout_s=20.0), apart=True).ending == "finished"


def _run(program: str, limits: Limits, *, apart: bool) -> Execution:
    mark = secrets.token_hex(16)
    task = {"program": program, "mark": mark, "apart": apart, "unshare_network": not limits.network}
    task |= {"timeout_s": limits.timeout_s, "memory_bytes": limits.memory_mib * _MIB}
    task |= {"file_bytes": limits.file_mib * _MIB}
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        reading, writing = os.pipe()
        # A process that outlived the program may hold the other end; what was told is there now.
        os.set_blocking(reading, False)
        with os.fdopen(reading, "rb") as result:
            try:
                process = _start(folder, writing)
            finally:
                os.close(writing)
            done = _wait(process, json.dumps({**task, "result_fd": writing}), limits)
            told = (result.read(100_000) or b"") if done else b""
    return _execution(told, mark, process.returncode, limits) if done else _timed_out(limits)


def _start(folder: str, result_fd: int) -> subprocess.Popen[bytes]:
    # One thread for numerical libraries: each of theirs would reserve address space.
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    return subprocess.Popen(
        [sys.executable, "-I", "-B", str(_RUNNER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        pass_fds=(result_fd,),
        start_new_session=True,
    )


def _wait(process: subprocess.Popen[bytes], task: str, limits: Limits) -> bool:
    """Whether it ended in time; afterwards nothing of it runs."""
    try:
        # The runner keeps the time itself; this is for one that can't any more.
        process.communicate(task.encode(), timeout=limits.timeout_s + _START_S)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _execution(told: bytes, mark: str, code: int, limits: Limits) -> Execution:
    try:
        result: dict[str, Any] = json.loads(told.splitlines()[0]) if told else {}
    except ValueError:
        result = {}
    if result.get("mark") == mark:
        return Execution(result["ending"], result["detail"])
    if code == -signal.SIGXCPU or code == 128 + signal.SIGXCPU or code == 128 + signal.SIGALRM:
        return _timed_out(limits)
    # A program's own exit code may lie there too, where no signal does.
    if code - 128 in set(signal.Signals):
        return Execution("killed", f"killed by {signal.Signals(code - 128).name}")
    return Execution("ended_early", "the process ended before its last line")


def _timed_out(limits: Limits) -> Execution:
    return Execution("timed_out", f"not done after {limits.timeout_s:g} s")
