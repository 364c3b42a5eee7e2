"""What a run stands on: the platform asked for, versions, git state, and the compilation cache."""

import importlib.metadata
import os
import platform as python_platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jax

import llama_jax

Platform = Literal["cpu", "gpu", "tpu"]

PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "array-record",
    "numpy", "tokenizers", "tiktoken",
)  # fmt: skip

HINTS = {
    "tpu": (
        "is the runtime type TPU (Colab: Runtime > Change runtime type), is libtpu installed "
        "(pip install 'llama-jax[tpu]'), and does another process hold the chip "
        "(sudo lsof -w /dev/accel* /dev/vfio/*)?"
    ),
    "gpu": (
        "is the CUDA build of JAX installed (pip install 'llama-jax[cuda]'), "
        "and does nvidia-smi work?"
    ),
    "cpu": "unset JAX_PLATFORMS",
}


class PlatformError(ValueError):
    """The platform asked for isn't there; one line with a hint."""


def select_platform(platform: Platform | None) -> None:
    """Use this platform or fail; None takes JAX's choice, which `describe_devices` tells.

    Must come before the first use of a device: JAX picks its backend once.

    Raises:
      PlatformError: it isn't there. JAX alone would warn and go on, slowly, on the CPU.
    """
    if platform is None:
        return
    # By name JAX wants CUDA or ROCm and fails on the one that is absent, so it has to choose; the
    # host's CPU stays at hand beside a TPU.
    chosen = {"gpu": "", "tpu": "tpu,cpu", "cpu": "cpu"}[platform]
    jax.config.update("jax_platforms", chosen)
    try:
        found = jax.devices()[0].platform
    except RuntimeError as error:
        raise PlatformError(_absent(platform, str(error))) from None
    if found != platform:
        raise PlatformError(_absent(platform, f"JAX runs on {found}"))


def describe_devices() -> str:
    """The start-up line: `cpu, 8 devices (cpu), 1 process, jax 0.10.2`."""
    devices = jax.devices()
    processes = jax.process_count()
    return (
        f"{devices[0].platform}, {_count(len(devices), 'device')} ({devices[0].device_kind}), "
        f"{_count(processes, 'process', 'processes')}, jax {jax.__version__}"
    )


def enable_compilation_cache() -> str | None:
    """Keep compiled programs on disk between runs; the folder, or None where it is turned off.

    `JAX_COMPILATION_CACHE_DIR` moves it, `JAX_ENABLE_COMPILATION_CACHE=0` turns it off.
    """
    config: Any = jax.config  # its fields are made at run time, unknown to type checkers
    if not config.jax_enable_compilation_cache:
        return None
    if config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        config.update("jax_compilation_cache_dir", str(home / "llama_jax" / "xla"))
    return config.jax_compilation_cache_dir


def versions() -> dict[str, str]:
    """Python's and each package's version; packages that aren't installed are left out."""
    found = {"python": python_platform.python_version(), "llama-jax": llama_jax.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside a checkout or without git."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain")
    if commit is None or status is None:
        return None
    return {"commit": commit, "modified": [line[3:] for line in status.splitlines()]}


def describe_start() -> dict[str, Any]:
    """Everything that one start of a run should be traceable to."""
    config: Any = jax.config
    return {
        "command": sys.argv,
        "devices": describe_devices(),
        "versions": versions(),
        "git": git_state(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "matmul_precision": str(config.jax_default_matmul_precision or "default"),
    }


def _git(*arguments: str) -> str | None:
    folder = Path(llama_jax.__file__).parents[1]
    # An installed package inside somebody's repository is not that repository's code.
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


def _absent(platform: Platform, cause: str) -> str:
    first_line = cause.strip().splitlines()[0] if cause.strip() else "no reason given"
    return f"platform '{platform}' was asked for and isn't there: {first_line}; {HINTS[platform]}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
