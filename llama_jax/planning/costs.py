"""What a whole run costs by its plan: hours, money at a price that was given, checkpoints.

The step time is an estimate; how far such estimates were from published times stands in PUBLISHED.
"""

import dataclasses
from typing import Any, NamedTuple

from llama_jax.config.hardware import Chip
from llama_jax.config.run import RunConfig
from llama_jax.planning.plan import Plan

# What one VM is taken to write to an object store in a second, where the user gives no figure. No
# measurement: a round figure below what 100 Gbit/s networks allow.
ASSUMED_STORAGE_BYTES_PER_S = 1e9


class Published(NamedTuple):
    """A program with a published step time, and this method's estimate of it."""

    program: str
    slice_name: str
    estimate_s: float  # with all communication hidden
    ici_s: float  # what would be added with none hidden
    measured_s: float


# MaxText's programs, compiled ahead of time (jax 0.10.2, libtpu 0.0.52), against the step times
# that google's tpu-recipes and MaxText publish for the same models, slices and batches.
PUBLISHED = (
    Published("llama3.1-405b, 2 x 8192 a chip", "v5p-1024", 122.84, 6.11, 131.474),
    Published("llama3.1-70b, 2 x 8192 a device", "tpu7x-128", 12.82, 1.41, 12.2),
    Published("llama3.1-8b, 3 x 8192 a chip", "v6e-16", 3.12, 0.35, 3.393),
    Published("llama3.1-8b, 3 x 8192, SparseCore offload", "v6e-16", 3.19, 0.35, 3.393),
    Published("llama3.1-8b, 4 x 8192 a chip", "v6e-256", 3.98, 0.17, 4.546),
)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of the whole run, without stops, evaluations and start-up.

    Attributes:
      money: None without a price.
      copy_s: how long a save holds up the step: the state's way to the host over PCIe.
      write_s: how long writing goes on beside the steps, at `storage_bytes_per_s` a VM.
    """

    steps: int
    tokens: int
    hours: float
    chip_hours: float
    money: float | None
    price_per_chip_hour: float | None
    checkpoint_bytes: int
    saves: int
    copy_s: float
    write_s: float
    storage_bytes_per_s: float


def run_costs(
    plan: Plan,
    config: RunConfig,
    chip: Chip,
    *,
    num_hosts: int,
    price_per_chip_hour: float | None = None,
    storage_bytes_per_s: float = ASSUMED_STORAGE_BYTES_PER_S,
) -> Costs:
    """Costs of all steps by the plan's estimated step time."""
    steps = config.training.steps
    hours = steps * plan.time_s["estimate"] / 3600
    chip_hours = hours * plan.num_chips
    money = None if price_per_chip_hour is None else chip_hours * price_per_chip_hour
    state_bytes_a_chip = plan.checkpoint_bytes / plan.num_chips
    return Costs(
        steps=steps,
        tokens=steps * plan.tokens_per_step,
        hours=hours,
        chip_hours=chip_hours,
        money=money,
        price_per_chip_hour=price_per_chip_hour,
        checkpoint_bytes=plan.checkpoint_bytes,
        saves=-(-steps // config.checkpoint.every),
        copy_s=state_bytes_a_chip / chip.pcie_bytes_per_s,
        write_s=plan.checkpoint_bytes / num_hosts / storage_bytes_per_s,
        storage_bytes_per_s=storage_bytes_per_s,
    )


def costs_to_json(costs: Costs) -> dict[str, Any]:
    """For `--json`: the fields, and the error seen of the estimate that they rest on."""
    return {**dataclasses.asdict(costs), "estimate_error": error_seen()}


def error_seen() -> str:
    """How far the method's estimates were from published times, in words."""
    ratios = [row.estimate_s / row.measured_s for row in PUBLISHED]
    exposed = [(row.estimate_s + row.ici_s) / row.measured_s for row in PUBLISHED]
    return (
        f"an estimate, with all communication hidden behind compute: on {len(PUBLISHED)} programs "
        f"with published step times this method gave {min(ratios):.2f} to {max(ratios):.2f} of the "
        f"time measured ({min(exposed):.2f} to {max(exposed):.2f} with ICI time added)"
    )
