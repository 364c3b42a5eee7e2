"""A plan as a picture: memory by category under the chip's limit, time by bound."""

from pathlib import Path
from typing import Any

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.planning.plan import BOUNDS, Plan
from llama_jax.planning.report import GIB, memory_categories, seconds

FORMATS = ("png", "svg", "pdf")
_COLORS = ("#08519c", "#3182bd", "#9ecae1", "#fdae6b", "#d94801", "#7f2704")


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw into a file; its suffix says the format.

    Raises:
      ConfigError: an unknown suffix.
    """
    suffix = path.suffix.removeprefix(".")
    if suffix not in FORMATS:
        raise ConfigError(f"unknown format '{suffix}'{nearest(suffix, FORMATS)}", key="--picture")
    # The object interface: pyplot would pick a GUI backend and keep every figure alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    memory, time = figure.subplots(1, 2, width_ratios=(2, 3))
    _draw_memory(memory, plan)
    _draw_time(time, plan)
    slices = f"{plan.num_slices} x " if plan.num_slices > 1 else ""
    figure.suptitle(f"{plan.run} on {slices}{plan.slice_name}, a chip and step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=suffix, dpi=150)


def _draw_memory(axes: Any, plan: Plan) -> None:
    bottom = 0.0
    for (name, size), color in zip(memory_categories(plan).items(), _COLORS, strict=False):
        label = f"{name}: {size / GIB:.2f}"
        axes.bar("HBM", size / GIB, bottom=bottom, color=color, label=label, width=0.5)
        bottom += size / GIB
    limit = plan.hbm_bytes / GIB
    axes.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"limit: {limit:.2f}")
    axes.set(ylabel="GiB", xlim=(-0.5, 0.5), ylim=(0, limit * 1.45), title="memory")
    axes.legend(fontsize=8, loc="upper center")


def _draw_time(axes: Any, plan: Plan) -> None:
    names = [*BOUNDS, "estimate"]
    values = [plan.time_s[name] for name in names]
    colors = ["#9ecae1"] * len(BOUNDS) + ["#d94801"]
    bars = axes.barh(names, values, color=colors)
    axes.bar_label(bars, [seconds(value) for value in values], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set(
        xlabel="seconds",
        xlim=(0, max(values) * 1.2),
        title=f"time by bound; MFU {plan.mfu:.1%} by the estimate",
    )
