"""A plan: what a run's step takes on a slice, and how it is written to JSON and read back.

Figures are a chip's and a step's, also where JAX sees two devices in a chip. Times are of the whole
step: all chips work at once.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config.loading import ConfigError
from llama_jax.planning.memory_report import Buffer

BOUNDS = ("compute", "hbm", "ici", "dcn", "host")


@dataclasses.dataclass(frozen=True)
class CollectiveUse:
    """One kind of collective over one mesh axis; bytes are those that a chip puts out or takes."""

    kind: str
    axis: str
    count: int
    bytes: int
    overlapped: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled run.

    Attributes:
      run: its name.
      topology: as in `v5e:4x4`; `slice_name` as in `v5e-16`; `num_slices` of them.
      num_chips: in all slices.
      mesh: sizes of the axes.
      settings: of the run, what bears on memory and time (remat, attention, microbatches, ...).
      hbm_bytes: of a chip, what a program can have.
      peak_bytes: the compiler's, of HBM; params, optimizer, gradient and batch bytes are parts.
      memory: what is held at the peak by category, as the compiler's tables tell it; {} where they
        can't be read. `buffers` are the largest, a device's.
      host_bytes: kept in the host's memory by the program.
      time_s: by bound; `estimate`, the static estimate of a step with communication hidden; and
        `exposed`, the time of collectives that the compiled schedule doesn't overlap.
      flags: libtpu's, as given to the compiler.
      program: the hash of all that the compiler was given; equal hashes, equal programs.
      checkpoint_bytes: the whole state, over all chips.
      versions: of jax and libtpu.
      uncounted_kernels: of the kernel calls, those whose FLOPs aren't known and aren't counted.
    """

    run: str
    topology: str
    slice_name: str
    num_slices: int
    num_chips: int
    devices_per_chip: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    tokens_per_step: int
    hbm_bytes: int
    peak_bytes: int
    argument_bytes: int
    temp_bytes: int
    code_bytes: int
    host_bytes: int
    params_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    batch_bytes: int
    memory: dict[str, int]
    buffers: tuple[Buffer, ...]
    model_flops: float
    executed_flops: float
    hbm_traffic_bytes: float
    collectives: tuple[CollectiveUse, ...]
    kernel_calls: dict[str, int]
    time_s: dict[str, float]
    peak_flops: float
    checkpoint_bytes: int
    compile_s: float
    flags: dict[str, str]
    program: str
    versions: dict[str, str]
    uncounted_kernels: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def free_bytes(self) -> int:
        """What is left of the chip's HBM at the peak."""
        return self.hbm_bytes - self.peak_bytes

    @property
    def tokens_per_s_per_chip(self) -> float:
        """By the estimated time."""
        return self.tokens_per_step / self.num_chips / self.time_s["estimate"]

    @property
    def pessimistic_s(self) -> float:
        """The estimate with nothing hidden that the schedule doesn't hide, or the host's bound."""
        return max(self.time_s["estimate"] + self.time_s["exposed"], self.time_s["host"])

    @property
    def mfu(self) -> float:
        """Model FLOPs at the estimated time, over the chip's bfloat16 peak."""
        return self.model_flops / self.time_s["estimate"] / self.peak_flops


def to_json(plan: Plan) -> dict[str, Any]:
    """What `plan --json` prints and a plan's file holds: the fields, and what follows of them."""
    return {
        **dataclasses.asdict(plan),
        "fits": True,
        "free_bytes": plan.free_bytes,
        "tokens_per_s_per_chip": plan.tokens_per_s_per_chip,
        "mfu": plan.mfu,
    }


def read_plan(path: Path) -> Plan:
    """A plan from a file of `--json`'s output.

    Raises:
      ConfigError: absent, or not a plan that this version wrote.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError("no such file", source=str(path)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"not a plan of this version's `plan --json`: {error}", source=str(path)
        ) from None


def from_json(table: Mapping[str, Any]) -> Plan:
    """The inverse of `to_json`.

    Raises:
      KeyError: a field is absent, as in a file of another version.
    """
    table = {"uncounted_kernels": {}, **table}
    values = {field.name: table[field.name] for field in dataclasses.fields(Plan)}
    values["collectives"] = tuple(CollectiveUse(**item) for item in values["collectives"])
    values["buffers"] = tuple(Buffer(**item) for item in values["buffers"])
    return Plan(**values)
