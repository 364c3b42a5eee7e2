"""The figures of an experiment as JSON, a table and a picture."""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What the command line says and a reader of the results has no use for.
_OWN_PLACES = ("experiment", "checkpoint", "gsm8k", "out", "work")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "-"


@dataclasses.dataclass
class Report:
    """Filled by an experiment, then written.

    Attributes:
      name: of the experiment, and of its files.
      out: their folder.
      arguments: of the command line.
      title: the heading.
      says: paragraphs above the table.
      header: of the table's columns.
      rows: of the table, as shown.
      figures: for the JSON file.
      panels: title, x axis and curves.
    """

    name: str
    out: Path
    arguments: Mapping[str, Any]
    title: str = ""
    says: list[str] = dataclasses.field(default_factory=list)
    header: Sequence[str] = ()
    rows: list[Sequence[str]] = dataclasses.field(default_factory=list)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    panels: list[tuple[str, str, list[Curve]]] = dataclasses.field(default_factory=list)

    def write(self) -> None:
        """NAME.json, NAME.md and NAME.png; the table is printed too."""
        self.out.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in self.arguments.items() if k not in _OWN_PLACES}
        found = {"settings": settings, "machine": machine(), **self.figures}
        path = self.out / f"{self.name}.json"
        path.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
        table = "\n".join("| " + " | ".join(row) + " |" for row in self._table())
        told = " ".join(f"`{key}` {_shown(value)}," for key, value in settings.items())
        text = "\n\n".join(
            [f"# {self.title}", *self.says, table, f"![curves]({self.name}.png)",
             f"Settings: {told.rstrip(',')}. Machine: {machine()}."]
        )  # fmt: skip
        (self.out / f"{self.name}.md").write_text(text + "\n", encoding="utf-8")
        print(table)
        self._draw()

    def _table(self) -> list[Sequence[str]]:
        return [self.header, ["---"] * len(self.header), *self.rows]

    def _draw(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        count = len(self.panels)
        figure = Figure(figsize=(6.5 * count, 4.2), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(1, count, squeeze=False)[0]
        for panel, (title, across, curves) in zip(axes, self.panels, strict=True):
            for curve in curves:
                panel.plot(curve.xs, curve.ys, curve.style, label=curve.label)
            panel.set(title=title, xlabel=across)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="small")
        canvas.print_png(self.out / f"{self.name}.png")


def machine() -> str:
    """The processor and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def interval(value: float, bounds: tuple[float, float], digits: int = 3) -> str:
    """`0.123 (0.100 to 0.150)`."""
    low, high = bounds
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
