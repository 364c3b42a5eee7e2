"""The loss curve as a picture, drawn from `metrics.jsonl` so that it spans restarts."""

import io
import math
from collections.abc import Sequence

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
    above.set(title=title, ylabel="loss, nats a token")
    above.grid(alpha=0.3)
    above.legend()
    below.plot(*series(records, "learning_rate"), color="#636363")
    below.set(xlabel="step", ylabel="rate")
    below.grid(alpha=0.3)
    image = io.BytesIO()
    canvas.print_png(image)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.getvalue())


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
