"""What to do about a run that doesn't fit: by how much, what takes the room, and what would help.

Each change that is advised has been compiled and fits. Those that leave what is learnt as it is
come first, then cheaper moments, then more chips.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from llama_jax.config.hardware import SLICES
from llama_jax.config.loading import ConfigError
from llama_jax.config.run import AdamWConfig, RunConfig
from llama_jax.planning.analytic import memory_model, sizes_of
from llama_jax.planning.compiling import OutOfMemoryError, PlanError
from llama_jax.planning.making import Planner
from llama_jax.planning.memory_report import Buffer
from llama_jax.planning.plan import Plan, to_json
from llama_jax.planning.report import gib, seconds, table
from llama_jax.planning.variants import REMAT_PRESETS, Changes, changed, describe

Say = Callable[[str], None]
MOST_ADVISED = 3
MOST_COMPILED = 8


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change that makes it fit, as compiled."""

    changes: Changes
    slice_name: str
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Advice:
    """Of a run that doesn't fit; bytes are a JAX device's.

    Attributes:
      parts: what would be held at the peak, by category; by formula where the compiler's tables
        can't be read.
      buffers: the largest of them.
    """

    run: str
    slice_name: str
    needed_bytes: int | None
    available_bytes: int
    parts: dict[str, float]
    buffers: tuple[Buffer, ...]
    remedies: tuple[Remedy, ...]


def advise(
    planner: Planner, config: RunConfig, name: str, error: OutOfMemoryError, say: Say
) -> Advice:
    """Look for up to three changes that fit, the mildest of each kind first."""
    say(f"{name} doesn't fit: {error}; looking for changes that do")
    sizes = sizes_of(config, planner.num_devices, planner.num_slices)
    model = memory_model(config, sizes)
    parts = error.held.by_category or dataclasses.asdict(model)
    remedies: list[Remedy] = []
    compiled = 0
    # What the formula misses of this run it will miss of its variants too.
    missed = (error.needed_bytes or 0) - model.peak_bytes
    for kind in _kinds(config, planner):
        for changes, on in kind:
            if len(remedies) == MOST_ADVISED or compiled == MOST_COMPILED:
                break
            if not _may_fit(config, changes, on, missed):
                continue
            compiled += 1
            remedy = _try(config, changes, on, name)
            outcome = "does not fit either" if remedy is None else "fits"
            say(f"  {_label(changes, on.slice_.name)}: {outcome}")
            if remedy is not None:
                remedies.append(remedy)
                break
    return Advice(
        run=name,
        slice_name=planner.slice_.name,
        needed_bytes=error.needed_bytes,
        available_bytes=error.available_bytes,
        parts={name: float(size) for name, size in parts.items() if size},
        buffers=error.held.buffers,
        remedies=tuple(remedies),
    )


def format_advice(advice: Advice) -> str:
    """The report of a run that doesn't fit."""
    needed = advice.needed_bytes
    over = "" if needed is None else f", {gib(needed - advice.available_bytes)} too much"
    lines = [
        f"{advice.run} does not fit on {advice.slice_name}: it needs "
        f"{'more' if needed is None else gib(needed)} of {gib(advice.available_bytes)} a "
        f"device{over}",
        "",
        "What takes the room",
        table([[name.replace("_", " "), gib(size)] for name, size in advice.parts.items()], "lr"),
    ]
    if advice.buffers:
        rows = [[gib(one.bytes), one.category, one.shape, one.name] for one in advice.buffers]
        lines += ["", "The largest buffers", table(rows, "rlll")]
    lines += ["", _remedies(advice)]
    return "\n".join(lines)


def advice_to_json(advice: Advice) -> dict[str, Any]:
    """For `--json`: `fits` is false, and the remedies are whole plans."""
    return {
        **{k: v for k, v in dataclasses.asdict(advice).items() if k != "remedies"},
        "fits": False,
        "remedies": [
            {"changes": one.changes, "slice": one.slice_name, "plan": to_json(one.plan)}
            for one in advice.remedies
        ],
    }


def _remedies(advice: Advice) -> str:
    if not advice.remedies:
        return "No change that was tried makes it fit; it needs more chips than were tried."
    rows = [
        [
            _label(one.changes, one.slice_name),
            gib(one.plan.peak_bytes / one.plan.devices_per_chip),
            f"estimate {seconds(one.plan.time_s['estimate'])} a step",
        ]
        for one in advice.remedies
    ]
    return "Changes that make it fit, each compiled\n" + table(rows, "lrl")


def _kinds(config: RunConfig, planner: Planner) -> Iterator[Iterator[tuple[Changes, Planner]]]:
    """Kinds of change, mildest change of a kind first."""
    yield ((changes, planner) for changes in _less_kept(config))
    yield ((changes, planner) for changes in _smaller_microbatches(config, planner))
    yield ((changes, planner) for changes in _smaller_moments(config))
    yield ((changes, planner) for changes in _combined(config, planner))
    yield (({}, on) for on in _more_chips(planner))


def _less_kept(config: RunConfig) -> Iterator[Changes]:
    place = REMAT_PRESETS.index(config.execution.remat)
    for preset in REMAT_PRESETS[place + 1 :]:
        yield {"execution.remat": preset, **_nothing_else_kept(config)}


def _nothing_else_kept(config: RunConfig) -> Changes:
    return {"execution.remat_save": []} if config.execution.remat_save else {}


def _smaller_microbatches(config: RunConfig, planner: Planner) -> Iterator[Changes]:
    most = _most_microbatches(config, planner)
    microbatches = 2 * config.training.microbatches
    while microbatches <= most:
        yield {"training.microbatches": microbatches}
        microbatches *= 2


def _most_microbatches(config: RunConfig, planner: Planner) -> int:
    sizes = sizes_of(config, planner.num_devices, planner.num_slices)
    rows = config.data.batch_size // (sizes.data * sizes.fsdp)
    return rows if rows else 1


def _smaller_moments(config: RunConfig) -> Iterator[Changes]:
    if isinstance(config.optimizer, AdamWConfig):
        yield {"optimizer.moments": "bfloat16"}
        yield {"optimizer.offload_moments": True}


def _combined(config: RunConfig, planner: Planner) -> Iterator[Changes]:
    """The least kept with ever smaller microbatches, and then with smaller moments too."""
    least_kept = {"execution.remat": REMAT_PRESETS[-1], **_nothing_else_kept(config)}
    both = [{**least_kept, **changes} for changes in _smaller_microbatches(config, planner)]
    yield from both
    for moments in _smaller_moments(config):
        yield {**(both[-1] if both else least_kept), **moments}


def _more_chips(planner: Planner) -> Iterator[Planner]:
    mine = planner.slice_
    larger = [
        part for part in SLICES.values()
        if part.chip is mine.chip and part.num_chips > mine.num_chips
    ]  # fmt: skip
    for part in sorted(larger, key=lambda part: part.num_chips)[:3]:
        yield dataclasses.replace(planner, slice_=part)


def _may_fit(config: RunConfig, changes: Changes, planner: Planner, missed: float) -> bool:
    try:
        variant = changed(config, changes)
        sizes = sizes_of(variant, planner.num_devices, planner.num_slices)
    except ConfigError:
        return False
    peak = memory_model(variant, sizes).peak_bytes + missed
    return peak <= 1.02 * planner.slice_.chip.device_usable_hbm_bytes


def _try(config: RunConfig, changes: Changes, planner: Planner, name: str) -> Remedy | None:
    try:
        plan = planner.plan(changed(config, changes), name)
    except (PlanError, ConfigError):
        return None
    return Remedy(changes, planner.slice_.name, plan)


def _label(changes: Changes, slice_name: str) -> str:
    return describe(changes) if changes else f"--topology {slice_name}"
