"""The table of XLA and libtpu flags by chip: what each is for, and what it did to the program.

`train` puts them where libtpu reads them, before JAX starts; `plan` compiles with the same ones.
A row needs an effect measured on a compiled step. Doesn't import JAX.
"""

import dataclasses
import os
import shlex
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from llama_jax.config.hardware import Chip, Slice
from llama_jax.config.loading import ConfigError, nearest
from llama_jax.config.run import FlagValue, RunConfig
from llama_jax.training.local_tpu import local_tpu

VARIABLE = "LIBTPU_INIT_ARGS"
# As a flag's value in a run's [compiler.flags]: leave this row of the table out.
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One row.

    Attributes:
      chips: names of `config.hardware.CHIPS` that it is for.
      at_most_devices: slices (of all together) up to this size; None for any.
      reason: what it makes the compiler do.
      effect: what that changed in a compiled program, with the program.
    """

    name: str
    value: str
    chips: tuple[str, ...]
    reason: str
    effect: str
    at_most_devices: int | None = None

    def applies(self, chip: Chip, num_devices: int | None) -> bool:
        """Whether the row is for this chip and size; an unknown size is not a small one."""
        if chip.name not in self.chips:
            return False
        limit = self.at_most_devices
        return limit is None or (num_devices is not None and num_devices <= limit)


# Measured with libtpu 0.0.52. TOY is 4 scanned layers x + silu(x @ w), w of 4096 x 4096 in float32,
# FSDP over all devices with bfloat16 gathers, remat, 2 x 2048 tokens a device.
#
# Not in the table, and why:
# - The "continuation fusion" of all-gathers (xla_tpu_enable_async_collective_fusion and its family)
#   is the default on v5e, and v5p and v6e refuse to compile with it.
# - xla_enable_async_all_gather alone changes nothing on v5p and v6e.
# - tpu7x has its collectives on the SparseCore by default.
FLAGS: tuple[Flag, ...] = (
    Flag(
        name="xla_jf_spmd_threshold_for_windowed_einsum_mib",
        value="1000000",
        chips=("v5e", "v5p", "v6e"),
        at_most_devices=64,
        reason=(
            "never cut a matmul whose weight is sharded into pieces that wait for a permute each; "
            "on small slices the compiler does so by default, and the pieces fill the MXU badly"
        ),
        effect=(
            "v6e-16, TOY with gathers left to the partitioner: loops of 10 collective-permutes "
            "become 2 all-gathers and 1 all-reduce, same peak. A step that gathers its weights "
            "explicitly, as ours does, has none to begin with"
        ),
    ),
    Flag(
        name="xla_tpu_enable_sparse_core_collective_offload_all_gather",
        value="true",
        chips=("v6e",),
        reason="gather weights on the SparseCores while the TensorCore computes",
        effect="v6e-16, TOY: all 2 all-gathers asynchronous instead of none; peak 296 to 328 MiB",
    ),
    Flag(
        name="xla_tpu_enable_sparse_core_collective_offload_all_reduce",
        value="true",
        chips=("v5p", "v6e"),
        reason="reduce gradients on the SparseCores while the TensorCore computes",
        effect=(
            "v5p-128, TOY: all 3 all-reduces asynchronous instead of none, peak 298 to 326 MiB; "
            "v6e-16: the 1 of gradients, peak as in the row above"
        ),
    ),
    Flag(
        name="xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
        value="true",
        chips=("v5p", "v6e"),
        reason="the same for gradients that the compiler reduces and scatters in one",
        effect=(
            "v5p-8, TOY: the fused all-reduce-scatter becomes 1 asynchronous reduce-scatter, peak "
            "448 to 456 MiB; v6e-16: 0 reduce-scatters, so no change there"
        ),
    ),
)


def flags_for(
    chip: Chip,
    size: Slice | int | None = None,
    overrides: Mapping[str, FlagValue] | None = None,
) -> dict[str, str]:
    """The flags of a run on this chip, name to value as the compiler reads them.

    The names have no dashes: as they are for `.compile(compiler_options=...)`.

    Args:
      size: the slice, or the number of devices of all slices together; None where it isn't known.
      overrides: a run's `compiler.flags`, which win; the value "default" leaves a row out.

    Raises:
      ConfigError: "default" for a flag that no row of this chip sets.
    """
    num_devices = size.num_devices if isinstance(size, Slice) else size
    flags = {flag.name: flag.value for flag in FLAGS if flag.applies(chip, num_devices)}
    for name, value in (overrides or {}).items():
        if value == DEFAULT:
            _remove(flags, name)
        else:
            flags[name] = as_text(value)
    return flags


def as_text(value: FlagValue) -> str:
    """A flag's value as the compiler reads it: `true`, not Python's `True`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def set_compiler_flags(
    config: RunConfig,
    platform: str | None = None,
    environment: MutableMapping[str, str] = os.environ,
    root: Path = Path("/"),
) -> str:
    """Set the flags of a run for the TPU of this machine, before JAX starts.

    Args:
      platform: what `--platform` says; with `cpu` no TPU is used, so no flags are set.
      environment, root: where the TPU is looked for and the flags go.

    Returns:
      A line that says what was set; "" where there is nothing to say: no TPU, and no flags of the
      run's own.
    """
    tpu = None if platform in ("cpu", "gpu") else local_tpu(environment, root)
    if tpu is None:
        ignored = ", ".join(config.compiler.flags)
        return f"compiler.flags are for TPUs, so here without effect: {ignored}" if ignored else ""
    flags = flags_for(tpu.chip, tpu.num_devices, config.compiler.flags)
    added, kept = apply_flags(flags, environment)
    parts = [f"--{name}={value}" for name, value in added.items()]
    parts += [f"{flag} (as {VARIABLE} has it)" for flag in kept.values()]
    return f"compiler flags for {tpu}: {' '.join(parts) or 'none'}"


def apply_flags(
    flags: Mapping[str, str], environment: MutableMapping[str, str] = os.environ
) -> tuple[dict[str, str], dict[str, str]]:
    """Put the flags where libtpu reads them. One that is there already wins.

    Must come before JAX starts a TPU: libtpu reads the variable once, and says nothing of changes.

    Returns:
      What was added, and by name the arguments that were there already.
    """
    present = _named(environment.get(VARIABLE, ""))
    new = {name: value for name, value in flags.items() if name not in present}
    added = " ".join(f"--{name}={value}" for name, value in new.items())
    whole = " ".join(part for part in (environment.get(VARIABLE, "").strip(), added) if part)
    if whole:
        environment[VARIABLE] = whole
    return new, {name: present[name] for name in flags if name in present}


def _named(arguments: str) -> dict[str, str]:
    """The flags in a command line, by name without dashes; `--noflag` sets `flag` too."""
    found = {}
    for argument in shlex.split(arguments):
        name = argument.partition("=")[0].lstrip("-")
        found[name] = argument
        if "=" not in argument:
            found[name.removeprefix("no")] = argument
    return found


def _remove(flags: dict[str, str], name: str) -> None:
    # With another chip's row the same run file serves both; a name in no row is a slip.
    known = sorted({flag.name for flag in FLAGS})
    if name not in known:
        raise ConfigError(
            f"'{DEFAULT}' leaves out a flag of ours, and we set no {name}{nearest(name, known)}",
            key=f"compiler.flags.{name}",
        )
    flags.pop(name, None)
