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


FLAGS: tuple[Flag, ...] = ()


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
