"""Plans of the shipped runs, kept as goldens: what moved since, and the table in docs/plans.md.

`python benchmarks/store_plans.py` compiles them anew and writes both.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from llama_jax.config.files import load_run_config, shipped_configs
from llama_jax.planning.diff import changes
from llama_jax.planning.plan import Plan, read_plan, to_json
from llama_jax.planning.report import GIB, seconds

# Folders of configs/runs whose runs are made for TPUs.
STAGES = ("pretrain", "bench", "sft", "reward", "dpo")
# Relative; under it, a difference is the compiler's choice of the day.
TOLERANCE = 0.01
# Bytes and FLOPs; times follow from them, and compiling takes as long as the machine takes.
_COMPARED_UNITS = ("GiB", "B", "FLOP")
# A part of the memory may move by this much of the peak before it counts.
_SMALL = 0.005


def shipped_runs() -> list[str]:
    """Names, such as `pretrain/llama3.1-8b-v5e-16`, of the shipped runs that name hardware."""
    root = shipped_configs() / "runs"
    files = [file for stage in STAGES for file in sorted((root / stage).glob("*.toml"))]
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    return [name for name in names if load_run_config(name).hardware is not None]


def read_plans(folder: Path) -> dict[str, Plan]:
    """Stored plans by the name of their run."""
    plans = [read_plan(file) for file in sorted(folder.rglob("*.json"))]
    return {plan.run: plan for plan in plans}


def moved(stored: Plan, now: Plan) -> list[str]:
    """What takes other bytes or FLOPs than the stored plan says, a line each; [] if nothing."""
    lines = []
    for change in changes(stored, now):
        if change.unit not in _COMPARED_UNITS:
            continue
        small = _SMALL * (stored.peak_bytes if change.unit == "GiB" else 0)
        if abs(change.after - change.before) > max(TOLERANCE * change.before, small):
            relative = change.after / change.before - 1 if change.before else float("inf")
            lines.append(
                f"{change.name}: {change.before:.6g} -> {change.after:.6g} ({relative:+.1%})"
            )
    if stored.kernel_calls != now.kernel_calls:
        lines.append(f"kernel calls: {stored.kernel_calls} -> {now.kernel_calls}")
    return lines


def write_plan(plan: Plan, folder: Path) -> None:
    """Store a plan under its run's name."""
    path = folder / f"{plan.run}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(plan), indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def plans_page(plans: Iterable[Plan]) -> str:
    """docs/plans.md."""
    ordered = sorted(plans, key=_place)
    versions = {f"jax {plan.versions['jax']}, libtpu {plan.versions['libtpu']}" for plan in ordered}
    rows = ["| " + " | ".join(_HEADINGS) + " |", "| --- " * len(_HEADINGS) + "|"]
    rows += ["| " + " | ".join(_row(plan)) + " |" for plan in ordered]
    return _INTRODUCTION.format(versions="; ".join(sorted(versions))) + "\n".join(rows) + "\n"


_HEADINGS = (
    "run",
    "slices",
    "mesh",
    "tokens a chip and microbatch",
    "microbatches",
    "remat",
    "peak GiB of",
    "executed / model FLOPs",
    "ICI + DCN s",
    "estimate s",
    "with exposed collectives s",
    "tokens/s a chip",
    "MFU",
    "compile s",
)
_INTRODUCTION = """# Plans of the shipped runs

Written by `python benchmarks/store_plans.py` from the plans in `tests/planning/plans/`; compiled
with {versions} on a machine without TPUs. Figures are a chip's and a step's. Times, tokens a second
and MFU are static estimates, not measurements: see docs/planning.md for how far such estimates were
from published times. `llama-jax plan NAME` prints a run's whole plan.

"""


def _place(plan: Plan) -> tuple[float, str, int]:
    return (
        plan.model_flops * plan.num_chips / plan.tokens_per_step,
        plan.slice_name,
        plan.num_chips,
    )


def _row(plan: Plan) -> Sequence[str]:
    slices = f"{plan.num_slices} x " if plan.num_slices > 1 else ""
    mesh = " ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "-"
    microbatches = plan.settings["microbatches"]
    kept = [
        plan.settings[name] for name in ("remat_save", "remat_offload") if name in plan.settings
    ]
    return (
        plan.run,
        f"{slices}{plan.slice_name}",
        mesh,
        f"{plan.tokens_per_step // plan.num_chips // microbatches:,}",
        str(microbatches),
        " + ".join([str(plan.settings["remat"]), *kept]),
        f"{plan.peak_bytes / GIB:.2f} of {plan.hbm_bytes / GIB:.2f}",
        f"{plan.executed_flops / plan.model_flops:.3f}",
        f"{plan.time_s['ici'] + plan.time_s['dcn']:.2f}",
        seconds(plan.time_s["estimate"]).removesuffix(" s"),
        seconds(plan.pessimistic_s).removesuffix(" s"),
        f"{plan.tokens_per_s_per_chip:,.0f}",
        f"{plan.mfu:.1%}",
        f"{plan.compile_s:.0f}",
    )
