"""What this machine has and what is wrong with it: facts and findings of `llama-jax doctor`."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.hardware import peak_flops
from llama_jax.training.environment import enable_compilation_cache, git_state, versions

# An accelerator shows as one of these whether or not JAX can use it.
ACCELERATORS = {
    "an NVIDIA GPU": ("/dev/nvidia[0-9]*",),
    "an AMD GPU": ("/dev/kfd",),
    "a TPU": ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"),
}
FEW_FREE_BYTES = 5 * 2**30
OLDEST_PYTHON = (3, 11)

# A product whose first element differs in the fourth digit when a chip multiplies in bfloat16.
PROBE_LEFT = ((0.3744, 0.1656), (0.4707, 0.1663))
PROBE_RIGHT = ((0.3946, 0.1186), (0.1569, 0.3145))
PROBE_EXACT = 0.17372088


def facts() -> dict[str, Any]:
    """Versions, devices with their memory, host memory and disk, settings. Starts JAX."""
    return {
        "versions": versions(),
        "git": git_state(),
        "devices": [_device_facts(device) for device in jax.local_devices()],
        "processes": jax.process_count(),
        "host": {
            "cpus": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        },
        "settings": {
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
            "compilation_cache": enable_compilation_cache() or "off",
            "matmul_precision": _matmul_precision(),
        },
    }


def findings() -> list[str]:
    """What is wrong, a line each with what to do; empty when nothing is."""
    found = (
        unused_accelerator(jax.default_backend()),
        late_xla_flags(),
        _low_disk(),
        _old_python(),
        _unwritable_cache(),
    )
    return [finding for finding in found if finding is not None]


def unused_accelerator(backend: str, root: Path = Path("/")) -> str | None:
    """A finding when JAX runs on the CPU of a machine that has something faster."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if backend != "cpu" or asked == "cpu":
        return None
    for name, patterns in ACCELERATORS.items():
        if any(True for pattern in patterns for _ in root.glob(pattern.lstrip("/"))):
            extra = "tpu" if name == "a TPU" else "cuda"
            return (
                f"this machine has {name}, but JAX fell back to the CPU: install "
                f"'llama-jax[{extra}]' and see that no other process holds the device"
            )
    return None


def late_xla_flags() -> str | None:
    """A finding when XLA_FLAGS asks for a number of CPU devices that JAX doesn't have.

    XLA reads the variable once, at the first use of a device; later changes do nothing, silently.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    asked = re.search(r"--xla_force_host_platform_device_count=(\d+)", flags)
    have = jax.local_device_count("cpu")
    if asked is None or int(asked[1]) == have:
        return None
    return (
        f"XLA_FLAGS asks for {asked[1]} CPU devices and there are {have}: it was set after JAX had "
        "started; set it before the first use of a device"
    )


def _device_facts(device: Any) -> dict[str, Any]:
    stats = device.memory_stats() or {}
    return {
        "id": device.id,
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_bytes": stats.get("bytes_limit"),
        "peak_flops": peak_flops(device.device_kind),
    }


def _matmul_precision() -> str:
    """How exactly float32 matrices are multiplied by default, measured."""
    left, right = (jnp.asarray(np.array(m, np.float32)) for m in (PROBE_LEFT, PROBE_RIGHT))
    found = float(jnp.matmul(left, right)[0, 0])
    exact = abs(found - PROBE_EXACT) < 1e-6
    return "float32" if exact else f"below float32 ({found:.8f} for {PROBE_EXACT})"


def _low_disk() -> str | None:
    free = shutil.disk_usage(Path.cwd()).free
    if free >= FEW_FREE_BYTES:
        return None
    return f"only {free / 2**30:.1f} GiB free on the disk of {Path.cwd()}: checkpoints need room"


def _old_python() -> str | None:
    if sys.version_info >= OLDEST_PYTHON:
        return None
    return f"Python {sys.version_info.major}.{sys.version_info.minor} is too old, 3.11 is needed"


def _unwritable_cache() -> str | None:
    folder = enable_compilation_cache()
    if folder is None or "://" in folder:
        return None
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    if os.access(existing, os.W_OK):
        return None
    return f"the compilation cache {folder} can't be written; set JAX_COMPILATION_CACHE_DIR"
