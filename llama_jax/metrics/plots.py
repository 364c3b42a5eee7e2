"""Curves as pictures: a run's, drawn from `metrics.jsonl` so that it spans restarts; by counts."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from llama_jax.metrics.records import Record


def plot_loss(records: Sequence[Record], path: epath.PathLike, title: str) -> None:
    """Draw loss and held-out loss by step, and the learning rate below, into a PNG file."""
    # The object interface: pyplot would pick a GUI backend and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, losses = series(records, "loss")
    above.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
    above.plot(steps, smooth(losses), color="#08519c", label="training, smoothed")
    held_out = [record for record in records if "held_out" in record]
    if held_out:
        points = [(record["step"], float(record["held_out"]["loss"])) for record in held_out]
        above.plot(
            *zip(*points, strict=True), "o-", color="#d94801", markersize=4, label="held out"
        )
    above.set(title=title, ylabel="loss")
    above.grid(alpha=0.3)
    above.legend()
    below.plot(*series(records, "learning_rate"), color="#636363")
    below.set(xlabel="step", ylabel="rate")
    below.grid(alpha=0.3)
    _write(canvas, path)


# Beside the loss, what objectives tell of pairs; those of each tuple are drawn together.
FIGURES = (("accuracy",), ("margin",), ("chosen_reward", "rejected_reward"), ("nll",))


def plot_figures(records: Sequence[Record], path: epath.PathLike, title: str) -> bool:
    """Draw what the steps and evaluations tell beside the loss into a PNG file.

    Returns:
      Whether there was any.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    held_out = [{"step": r["step"], **r["held_out"]} for r in records if "held_out" in r]
    groups = [g for g in FIGURES if any(series(records, name)[0] for name in g)]
    if not groups:
        return False
    figure = Figure(figsize=(9, 2.2 * len(groups) + 0.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for panel, names in zip(panels, groups, strict=True):
        for name, color in zip(names, ("#08519c", "#a63603"), strict=False):
            label = name.replace("_", " ")
            steps, values = series(records, name)
            panel.plot(steps, smooth(values), color=color, linewidth=1, label=f"{label}, smoothed")
            points = series(held_out, name)
            panel.plot(*points, "o--", color=color, markersize=4, label=f"{label}, held out")
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set(title=title)
    panels[-1].set(xlabel="step")
    _write(canvas, path)
    return True


def plot_counts(
    panels: Mapping[str, Mapping[str, Sequence[float]]], path: epath.PathLike, title: str, what: str
) -> bool:
    """Draw curves over 1, 2, 3, ... of something into a PNG file.

    Args:
      panels: by what the values of a panel are, its curves by their labels.
      what: what is counted.

    Returns:
      Whether there was any.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not panels:
        return False
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (name, curves) in zip(axes, panels.items(), strict=True):
        for (label, values), color in zip(curves.items(), ("#08519c", "#a63603"), strict=False):
            panel.plot(range(1, len(values) + 1), values, "o-", color=color, ms=3, label=label)
        panel.set(xlabel=what, ylabel=name)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.legend()
    _write(canvas, path)
    return True


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity, without the steps that don't have a finite one."""
    points = [(record["step"], float(record[name])) for record in records if name in record]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start (as Adam corrects its moments)."""
    average, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def _write(canvas: Any, path: epath.PathLike) -> None:
    image = io.BytesIO()
    canvas.print_png(image)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.getvalue())
