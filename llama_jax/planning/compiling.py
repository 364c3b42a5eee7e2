"""The very step that `train` runs, compiled for TPUs that aren't there.

libtpu holds the real TPU compiler and runs on any machine with x86-64 Linux: a topology's name
gives devices that can be compiled for, not run on.
"""

import dataclasses
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from llama_jax.config.hardware import Slice, wraps
from llama_jax.config.run import RunConfig
from llama_jax.planning.memory_report import Buffer, read_memory_report
from llama_jax.planning.program_text import ProgramError
from llama_jax.sharding.mesh import make_mesh
from llama_jax.training.assembly import Assembly, assemble
from llama_jax.training.local_tpu import QUIET_ENVIRONMENT

# Without these libtpu writes several lines to stderr at its start.
_ENVIRONMENT = {**QUIET_ENVIRONMENT, "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
# How many buffers a plan keeps, the largest.
LARGEST_BUFFERS = 8
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = re.compile(r"(?:temporaries|HBM usage|Used)\D*\(?([\d.]+)([KMGT]?)\)? ")
_REPORT_TOTAL = re.compile(r"^Total bytes: (\d+)", re.MULTILINE)


class PlanError(ValueError):
    """A run that can't be planned; one line."""


class OutOfMemoryError(PlanError):
    """The compiler found no room.

    Attributes:
      needed_bytes: of HBM on a JAX device, as the compiler says; None where it doesn't.
      available_bytes: what a program can have there.
      held: what would be held at the peak.
    """

    def __init__(self, needed_bytes: int | None, available_bytes: int, held: "Held") -> None:
        self.needed_bytes, self.available_bytes, self.held = needed_bytes, available_bytes, held
        needed = "more" if needed_bytes is None else f"{needed_bytes / 2**30:.2f} GiB"
        super().__init__(
            f"needs {needed} of HBM on a device that has {available_bytes / 2**30:.2f} GiB"
        )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one JAX device, as the compiler reports them.

    `argument_bytes` are the state and the batch; the new state takes the old one's place.
    `host_bytes` is what the program keeps in the host's memory, arguments and temporaries.
    """

    peak_bytes: int
    argument_bytes: int
    temp_bytes: int
    output_bytes: int
    alias_bytes: int
    code_bytes: int
    host_bytes: int


@dataclasses.dataclass(frozen=True)
class Held:
    """What is in a JAX device's HBM at the peak: bytes by category, and the largest buffers.

    Both empty where the compiler's own tables can't be read.
    """

    by_category: dict[str, int]
    buffers: tuple[Buffer, ...]


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes in one JAX device's HBM of what a step is given, before the compiler pads it.

    `host` is the part of the state that a device keeps in its host's memory.
    """

    params: int
    optimizer: int
    gradients: int  # float32, as the parameters are laid out
    batch: int
    host: int
    total: int  # of the whole state over all devices, as a checkpoint holds it


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step traced for a mesh, ready to be compiled."""

    stage: jax.stages.Lowered
    mesh: Mesh
    state_bytes: StateBytes
    lower_s: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Attributes:
      text: the optimised and scheduled HLO.
      held: what takes the room at the peak.
      compile_s: seconds in the compiler, without tracing.
    """

    text: str
    memory: Memory
    held: Held
    mesh: Mesh
    state_bytes: StateBytes
    compile_s: float


def prepare_compiler() -> None:
    """Set this process up for compiling only; before JAX's first use of a device.

    Raises:
      PlanError: the TPU compiler isn't installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            "the TPU compiler isn't installed: pip install 'llama-jax[tpu]' (x86-64 Linux; no TPU "
            "is needed)"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def topology_options(slice_: Slice, num_slices: int = 1) -> dict[str, Any]:
    """How the compiler is told of the slices, beside the topology's name."""
    options: dict[str, Any] = {}
    if slice_.chip.chip_config_name is not None:
        options["chip_config_name"] = slice_.chip.chip_config_name
    if num_slices > 1:
        options["num_slices"] = num_slices
    # By default the ends of a 3D slice's axes aren't joined, and every gather over all of it then
    # compiles to an all-reduce, which moves twice the bytes. 2D slices are told right.
    joined = wraps(slice_)
    if len(joined) == 3 and any(joined):
        options["wrap"] = joined
    return options


def topology_devices(slice_: Slice, num_slices: int = 1) -> list[Any]:
    """The JAX devices of so many slices, to compile for.

    Raises:
      PlanError: the compiler doesn't know the topology.
    """
    options = topology_options(slice_, num_slices)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=slice_.topology_name, **options
        )
    except Exception as error:
        raise PlanError(f"{slice_.topology_name}: {_first_line(error)}") from None
    return list(described.devices)


def lower_step(config: RunConfig, slice_: Slice, num_slices: int = 1) -> Lowered:
    """Trace the run's step for the slices.

    Raises:
      ConfigError: a mesh that doesn't fit the devices, the model or the batch.
      PlanError: the compiler doesn't know the topology.
    """
    mesh = make_mesh(config.mesh, topology_devices(slice_, num_slices))
    begun_s = time.perf_counter()
    assembly = assemble(config, mesh)
    with jax.set_mesh(mesh):
        stage = assembly.train_step.lower(assembly.abstract_state, assembly.abstract_batch)
    return Lowered(stage, mesh, _state_bytes(assembly), time.perf_counter() - begun_s)


def compile_lowered(lowered: Lowered, slice_: Slice, flags: Mapping[str, str]) -> Compiled:
    """Compile a traced step with libtpu's flags, named without dashes.

    Raises:
      OutOfMemoryError: it doesn't fit a device's HBM.
      PlanError: anything else that the compiler refuses.
    """
    with tempfile.TemporaryDirectory(prefix="llama_jax_plan_") as folder:
        # The dump costs next to nothing and has the tables of buffers, also of what doesn't fit.
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        begun_s = time.perf_counter()
        try:
            with jax.set_mesh(lowered.mesh):
                executable = lowered.stage.compile(compiler_options={**flags, **dump})
        except jax.errors.JaxRuntimeError as error:
            raise _compiler_error(error, slice_, Path(folder)) from None
        compile_s = time.perf_counter() - begun_s
        return Compiled(
            text=_text(executable, Path(folder)),
            memory=_memory(executable),
            held=_held(Path(folder)),
            mesh=lowered.mesh,
            state_bytes=lowered.state_bytes,
            compile_s=compile_s,
        )


def compile_step(
    config: RunConfig, slice_: Slice, num_slices: int, flags: Mapping[str, str]
) -> Compiled:
    """Trace and compile a run's step. Errors as `lower_step` and `compile_lowered`."""
    return compile_lowered(lower_step(config, slice_, num_slices), slice_, flags)


def _state_bytes(assembly: Assembly) -> StateBytes:
    state = assembly.abstract_state
    return StateBytes(
        params=_shard_bytes(state.params),
        optimizer=_shard_bytes(state.opt_state),
        gradients=_shard_bytes(state.params, itemsize=4),
        batch=_shard_bytes(assembly.abstract_batch),
        host=_shard_bytes(state, on_host=True),
        total=sum(leaf.size * _itemsize(leaf) for leaf in jax.tree.leaves(state)),
    )


def _shard_bytes(tree: Any, *, itemsize: int | None = None, on_host: bool = False) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * (itemsize or _itemsize(leaf))
        for leaf in jax.tree.leaves(tree)
        if (leaf.sharding.memory_kind == "pinned_host") == on_host
    )


def _itemsize(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8  # two words of 32 bits
    return leaf.dtype.itemsize


def _memory(executable: jax.stages.Compiled) -> Memory:
    found: Any = executable.memory_analysis()
    # With tensors offloaded, the compiler's peak counts some of those in the host's memory too. All
    # that it allots on the device is a bound, close to the peak in any program.
    new_bytes = found.output_size_in_bytes - found.alias_size_in_bytes
    allotted = found.argument_size_in_bytes + found.temp_size_in_bytes + new_bytes
    return Memory(
        peak_bytes=min(found.peak_memory_in_bytes, allotted),
        argument_bytes=found.argument_size_in_bytes,
        temp_bytes=found.temp_size_in_bytes,
        output_bytes=found.output_size_in_bytes,
        alias_bytes=found.alias_size_in_bytes,
        code_bytes=found.generated_code_size_in_bytes,
        host_bytes=found.host_argument_size_in_bytes + found.host_temp_size_in_bytes,
    )


def _text(executable: jax.stages.Compiled, folder: Path) -> str:
    try:
        text = executable.as_text()
    except jax.errors.JaxRuntimeError:
        # Programs with SparseCore collectives can't be read back: jaxlib's parser doesn't know
        # libtpu's `async-update`.
        text = None
    return text or _dumped(folder, "after_codegen") or _dumped(folder, "after_optimizations")


def _dumped(folder: Path, ending: str) -> str:
    """The newest and largest dumped file of a kind; "" where there is none."""
    files = sorted(folder.glob(f"*{ending}.txt"), key=lambda file: file.stat().st_size)
    return files[-1].read_text(encoding="utf-8", errors="replace") if files else ""


def _compiler_error(error: Exception, slice_: Slice, folder: Path) -> PlanError:
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message or "HBM" not in message.upper():
        return PlanError(f"the compiler refuses: {_first_line(error)}")
    held = _held(folder)
    # The report's total and the message count what is offloaded to the host's memory too.
    needed = sum(held.by_category.values()) or _needed_bytes(
        message, _dumped(folder, "memory-usage-report")
    )
    return OutOfMemoryError(needed, slice_.chip.device_usable_hbm_bytes, held)


def _needed_bytes(message: str, report: str) -> int | None:
    total = _REPORT_TOTAL.search(report)
    if total:
        return int(total.group(1))
    found = _NEEDED.search(message)
    return round(float(found.group(1)) * _UNITS[found.group(2)]) if found else None


def _held(folder: Path) -> Held:
    try:
        report = read_memory_report(folder)
    except ProgramError:
        return Held({}, ())
    by_category = {str(category): size for category, size in report.by_category.items()}
    return Held(by_category, report.buffers[:LARGEST_BUFFERS])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
