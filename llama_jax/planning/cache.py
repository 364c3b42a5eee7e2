"""Finished plans on disk, so that the same step for the same chips isn't compiled twice.

A plan is found again by all that it depends on: the traced program, the devices' order, the
compiler's flags and version, and this package's own way of reading compiled programs.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import hardware
from llama_jax.planning.compiling import Lowered

# What of a plan comes from reading the compiled program, and so changes when the reading does.
_READERS = (
    *("program", "loops", "flops", "traffic", "collectives", "kernel_calls", "estimate"),
    *("memory_report", "reading"),
)


_KERNEL_BODY = re.compile(r"\\22body\\22: \\22[^\\]*\\22")


def default_folder() -> Path:
    """Beside JAX's compilation cache; `XDG_CACHE_HOME` moves both."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "llama_jax" / "plans"


def versions() -> dict[str, str]:
    """Of what compiles."""
    found = {}
    for name in ("jax", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def program_of(lowered: Lowered, topology: str, flags: Mapping[str, str]) -> str:
    """The hash of all that the compiler is given, itself included; hexadecimal.

    Two steps with the same hash compile to the same program.
    """
    parts = {
        # Kernels by name, blocks and operands: what they hold names files of this machine.
        "program": _KERNEL_BODY.sub("", lowered.stage.as_text()),
        "devices": [device.id for device in lowered.mesh.devices.flat],
        "mesh": dict(lowered.mesh.shape),
        "topology": topology,
        "flags": dict(flags),
        "versions": versions(),
    }
    return _hash(parts)


def key_of(program: str) -> str:
    """Under which a plan is kept: the program, this environment and this package's reading."""
    parts = {
        "program": program,
        "environment": [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")],
        "reader": _readers_hash(),
    }
    return _hash(parts)


def load(folder: Path, key: str) -> dict[str, Any] | None:
    """What was stored under the key; None where nothing, or nothing readable, is."""
    try:
        return json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def store(folder: Path, key: str, record: Mapping[str, Any]) -> None:
    """Keep a record; where the folder can't be written, nothing is kept and nothing is lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{key}.{os.getpid()}.new"
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(folder / f"{key}.json")
    except OSError:
        return


def _hash(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _readers_hash() -> str:
    """Of the source of everything that turns a compiled program into figures."""
    here = Path(__file__).parent
    files = [file for name in _READERS for file in sorted(here.glob(f"{name}*.py"))]
    files.append(Path(hardware.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
