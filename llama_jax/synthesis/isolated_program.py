"""The other side of `isolation`: a script, started by path, that confines and runs a program.

Reads its task as JSON from stdin and writes how the program ended to the pipe that the task names.
Imports nothing of the package, so that it starts in milliseconds.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback

_NEW_USER, _NEW_PIDS, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Confine, fork, and let the child run the program while the parent keeps its time."""
    task = json.loads(sys.stdin.buffer.read())
    if task["apart"]:
        _unshare(network=task["unshare_network"])
    child = os.fork()
    if child == 0:
        _become_program(task)
        os._exit(0)
    code = _wait(child, task["timeout_s"])
    os._exit(code)


def _wait(child: int, timeout_s: float) -> int:
    """The child's exit code, or 128 and the signal; SIGALRM where its time was up."""
    end = time.monotonic() + timeout_s
    pause = 0.001
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if time.monotonic() > end:
            # The first process of its namespace takes all the others with it.
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 128 + signal.SIGALRM
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def _unshare(*, network: bool) -> None:
    """Namespaces of its own; this user stays who it is, so that its files stay its own."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _NEW_USER | _NEW_PIDS | _NEW_IPC | (_NEW_NETWORK if network else 0)
    if libc.unshare(flags) != 0:
        sys.exit(3)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
            file.write(text)


def _become_program(task: dict) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    seconds = int(task["timeout_s"]) + 1
    for limit, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, task["memory_bytes"]),
        (resource.RLIMIT_FSIZE, task["file_bytes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        # Where the system's own limit is lower it stays.
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    ending, detail = _run(task["program"])
    line = json.dumps({"mark": task["mark"], "ending": ending, "detail": detail[:500]})
    os.write(task["result_fd"], line.encode() + b"\n")


def _run(program: str) -> tuple[str, str]:
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(program, "program.py", "exec"), names)
    except MemoryError:
        return "out_of_memory", "out of memory"
    except SystemExit:
        return "ended_early", f"sys.exit{_place()}"
    except BaseException as error:
        text = " ".join(str(error).split())
        return "raised", f"{type(error).__name__}{': ' if text else ''}{text}{_place()}"
    return "finished", "ran to its last line"


def _place() -> str:
    """` (line 3)`: the program's own line that the error came through last."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    lines = [frame.lineno for frame in frames if frame.filename == "program.py"]
    return f" (line {lines[-1]})" if lines else ""


if __name__ == "__main__":
    main()
