"""From a run's config and a slice to its plan: trace, look in the cache, compile, read, add up."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config.hardware import Chip, Slice
from llama_jax.config.run import RunConfig
from llama_jax.models.accounting import flops_per_token
from llama_jax.planning import cache
from llama_jax.planning.compiling import (
    Held,
    Lowered,
    OutOfMemoryError,
    compile_lowered,
    lower_step,
    topology_options,
)
from llama_jax.planning.memory_report import Buffer
from llama_jax.planning.plan import CollectiveUse, Plan
from llama_jax.planning.reading import read_step
from llama_jax.training.compiler_flags import VARIABLE, apply_flags, flags_for

# Of a record, what the compiler counts for a JAX device and a plan for a chip.
_OF_A_DEVICE = (
    *("peak_bytes", "argument_bytes", "temp_bytes", "code_bytes", "host_bytes"),
    *("params_bytes", "optimizer_bytes", "gradient_bytes", "batch_bytes"),
    *("executed_flops", "hbm_traffic_bytes"),
)
# Settings that a plan tells where they aren't the default.
_TOLD = {
    "execution": (
        *("param_dtype", "compute_dtype", "attention", "context_attention", "matmul_precision"),
        *("remat_save", "remat_offload", "scan_layers", "loss_chunk_size"),
    ),
    "optimizer": ("moments", "offload_moments"),
}


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans runs for so many slices; with a folder, remembers what it has compiled."""

    slice_: Slice
    num_slices: int = 1
    cache_folder: Path | None = None

    def plan(self, config: RunConfig, name: str) -> Plan:
        """The plan of a run.

        Raises:
          OutOfMemoryError: it doesn't fit.
          ConfigError: its mesh doesn't fit the slices, the model or the batch.
          PlanError: the compiler refuses it.
        """
        lowered = lower_step(config, self.slice_, self.num_slices)
        flags = self.flags(config)
        program = self._program(lowered, flags)
        record = self._record(lowered, flags, program)
        if "overflow" in record:
            raise _overflow(record["overflow"])
        return self._plan(config, name, lowered, flags, program, record)

    def program(self, config: RunConfig) -> str:
        """The hash of all that `plan` would give the compiler; traces, compiles nothing."""
        lowered = lower_step(config, self.slice_, self.num_slices)
        return self._program(lowered, self.flags(config))

    def flags(self, config: RunConfig) -> dict[str, str]:
        """The compiler's flags, as `train` sets them: the user's environment wins here too."""
        wanted = flags_for(self.slice_.chip, self.num_devices, config.compiler.flags)
        added, _ = apply_flags(wanted, {VARIABLE: os.environ.get(VARIABLE, "")})
        return added

    @property
    def num_devices(self) -> int:
        """JAX devices in all slices."""
        return self.slice_.num_devices * self.num_slices

    def _program(self, lowered: Lowered, flags: Mapping[str, str]) -> str:
        topology = f"{self.num_slices} x {self.slice_.topology_name}"
        if "wrap" in topology_options(self.slice_):
            topology += " with its ends joined"
        return cache.program_of(lowered, topology, flags)

    def _record(self, lowered: Lowered, flags: Mapping[str, str], program: str) -> dict[str, Any]:
        """What compiling showed, from the cache where it has been compiled before."""
        if self.cache_folder is None:
            return self._compile(lowered, flags)
        key = cache.key_of(program)
        record = cache.load(self.cache_folder, key)
        if record is None:
            record = self._compile(lowered, flags)
            cache.store(self.cache_folder, key, record)
        return record

    def _compile(self, lowered: Lowered, flags: Mapping[str, str]) -> dict[str, Any]:
        try:
            compiled = compile_lowered(lowered, self.slice_, flags)
        except OutOfMemoryError as error:
            return {
                "overflow": {
                    "needed_bytes": error.needed_bytes,
                    "available_bytes": error.available_bytes,
                    **dataclasses.asdict(error.held),
                }
            }
        return read_step(compiled, self.slice_)

    def _plan(
        self,
        config: RunConfig,
        name: str,
        lowered: Lowered,
        flags: dict[str, str],
        program: str,
        record: dict[str, Any],
    ) -> Plan:
        chip = self.slice_.chip
        num_chips = self.slice_.num_chips * self.num_slices
        tokens = config.data.batch_size * config.data.seq_len
        per_token = flops_per_token(config.model, config.data.seq_len, config.adapter)
        a_chip = {key: record[key] * chip.devices_per_chip for key in _OF_A_DEVICE}
        return Plan(
            run=name,
            topology=self.slice_.topology_name,
            slice_name=self.slice_.name,
            num_slices=self.num_slices,
            num_chips=num_chips,
            devices_per_chip=chip.devices_per_chip,
            mesh=dict(lowered.mesh.shape),
            settings=_settings(config),
            tokens_per_step=tokens,
            hbm_bytes=chip.device_usable_hbm_bytes * chip.devices_per_chip,
            memory={
                name: size * chip.devices_per_chip for name, size in record["by_category"].items()
            },
            buffers=tuple(Buffer(**buffer) for buffer in record["buffers"]),
            model_flops=per_token * tokens / num_chips,
            collectives=tuple(_of_a_chip(use, chip) for use in record["collectives"]),
            kernel_calls=record["kernel_calls"],
            uncounted_kernels=record["uncounted_kernels"],
            time_s=record["time_s"],
            peak_flops=chip.peak_flops["bf16"],
            checkpoint_bytes=lowered.state_bytes.total,
            compile_s=record["compile_s"],
            flags=flags,
            program=program,
            versions=cache.versions(),
            **a_chip,
        )


def _overflow(record: dict[str, Any]) -> OutOfMemoryError:
    buffers = tuple(Buffer(**buffer) for buffer in record["buffers"])
    held = Held(record["by_category"], buffers)
    return OutOfMemoryError(record["needed_bytes"], record["available_bytes"], held)


def _of_a_chip(use: dict[str, Any], chip: Chip) -> CollectiveUse:
    # Both devices of a chip run each collective: as many calls, more bytes.
    return CollectiveUse(**{**use, "bytes": use["bytes"] * chip.devices_per_chip})


def _settings(config: RunConfig) -> dict[str, Any]:
    """What of a run bears on its memory and time, beside mesh and model."""
    found: dict[str, Any] = {
        "batch_size": config.data.batch_size,
        "seq_len": config.data.seq_len,
        "microbatches": config.training.microbatches,
        "remat": config.execution.remat,
        "optimizer": config.optimizer.kind,
    }
    # Of the rest, what isn't left as it comes.
    for table, names in _TOLD.items():
        settings = getattr(config, table)
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if field.name in names and value != field.default:
                found[field.name] = "+".join(value) if isinstance(value, tuple) else value
    return found
