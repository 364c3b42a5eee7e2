"""When one process of a run ends, the others end too, each with one line and exit code 1.

A process that fails tells the others why. One that is killed, or whose machine is gone, is missed
by JAX's heartbeats within `dead_after_s()`, or at once where its connections break. Without this
module the others would wait for it in a collective, or abort with a C++ stack trace.
"""

import atexit
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

# JAX's own default is 100 s. A machine that is only slow beats in time: the beats come from a C++
# thread that neither Python nor a compilation holds up.
DEAD_AFTER_S = 60
DEAD_AFTER_VARIABLE = "LLAMA_JAX_DEAD_AFTER_S"

FAILED_KEY = "llama_jax/failed"
# How long a failed process stays for the others to read why; process 0 holds what they read.
TELLING_S = 3.0
ASKING_EVERY_S = 1.0

LOST = (
    "another process of this run is gone: killed, preempted, or out of reach. This one ends too; "
    "the same command on all of them goes on from the last checkpoint"
)
# What a collective or a barrier says when the fault lies with another process.
_SECONDARY = re.compile(
    r"gloo|connection (reset|closed|refused)|broken pipe|heartbeat|coordination ?service|"
    r"UNAVAILABLE|DEADLINE_EXCEEDED|barrier",
    re.IGNORECASE,
)


class PeerError(RuntimeError):
    """Another process ended, so this one can't go on; one line."""


def dead_after_s() -> int:
    """Seconds without a heartbeat after which a process counts as dead."""
    return int(os.environ.get(DEAD_AFTER_VARIABLE, DEAD_AFTER_S))


def watch() -> None:
    """Have this process end when another one fails or dies. Nothing where it is alone."""
    if _client() is None:
        return
    restore = _end_on_abort()
    stop = threading.Event()
    thread = threading.Thread(target=_wait_for_a_failure, args=(stop,), name="peers", daemon=True)
    thread.start()

    def end() -> None:
        # A thread that comes back from C++ while the interpreter goes away takes it down. So does
        # the handler of aborts, which is of use until JAX has said goodbye to the others.
        stop.set()
        thread.join()
        jax.distributed.shutdown()
        restore()

    # Called before what was registered earlier: JAX's own way out then finds nothing to do.
    atexit.register(end)


def explain(error: Exception) -> Exception:
    """The error to show: that of the process at fault where it isn't this one.

    Of a fault of its own the others are told. Waits a moment for what another one may tell.
    """
    client = _client()
    if client is None:
        return error
    if not _is_secondary(error):
        known = type(error).__module__.startswith("llama_jax")
        cause = str(error) if known else f"{type(error).__name__}: {error}"
        _tell(client, f"process {_number()} on {socket.gethostname()} failed: {cause}")
        return error
    with contextlib.suppress(Exception):
        return PeerError(_one_line(client.blocking_key_value_get(FAILED_KEY, int(TELLING_S * 1e3))))
    return PeerError(f"{LOST} ({_one_line(str(error))[:200]})")


def leave(code: int) -> None:
    """End at once with this code where other processes take part; else return.

    JAX's way out would wait for all of them to come, minutes long, and then abort.
    """
    if _client() is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if _number() == 0:
        time.sleep(TELLING_S)
    os._exit(code)


def _client() -> Any:
    """The key-value store that all processes share; None where this process is alone."""
    state = _joined()
    return state.client if state.num_processes > 1 else None


def _number() -> int:
    # Not `jax.process_index()`, which would start the devices.
    return _joined().process_id


def _joined() -> Any:
    # What jax.distributed made has no public name; Orbax uses it as well.
    from jax._src import distributed

    return distributed.global_state


def _is_secondary(error: Exception) -> bool:
    runtime = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    wrapped = isinstance(error.__cause__, Exception) and _is_secondary(error.__cause__)
    return wrapped or (runtime and _SECONDARY.search(str(error)) is not None)


def _tell(client: Any, message: str) -> None:
    # The first to fail is the cause; who comes second finds the key taken.
    with contextlib.suppress(Exception):
        client.key_value_set(FAILED_KEY, _one_line(message))


def _wait_for_a_failure(stop: threading.Event) -> None:
    client = _client()
    while not stop.wait(ASKING_EVERY_S):
        try:
            message = client.key_value_try_get(FAILED_KEY)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the store is gone: JAX tells that by itself
        if message.startswith(f"process {_number()} "):
            return
        _say(f"{message}; this process ends too")
        os._exit(1)


def _end_on_abort() -> Callable[[], None]:
    """On SIGABRT say one line and exit with 1; returns what undoes this.

    JAX aborts the process when another is dead. Python's own handlers come too late for that:
    they run between bytecodes, and `abort` doesn't return.
    """
    libc = ctypes.CDLL(None)
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)

    def restore() -> None:
        libc.signal(signal.SIGABRT, None)  # SIG_DFL is 0

    def handle(number: int) -> None:
        restore()
        _say(f"aborted, most likely because {LOST}. What stands above says more")
        os._exit(1)

    # Kept for the life of the process, for C holds only its address.
    global _abort_handler
    _abort_handler = handler_type(handle)
    libc.signal(signal.SIGABRT, _abort_handler)
    return restore


_abort_handler: Any = None


def _say(message: str) -> None:
    os.write(2, f"llama-jax: error: {message}\n".encode())


def _one_line(text: str) -> str:
    return " ".join(text.split())
