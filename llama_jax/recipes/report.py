"""The figures of all rounds in one place: `report.json` for programs, `report.md` for people."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_jax.config.run_files import write_json, write_text
from llama_jax.recipes.stages import Say

_DONE_FILE = "stage.json"
_AGAINST = {"last": "last", "start": "model of the start"}


def write_report(folder: Path, say: Say) -> None:
    """Write both from the stages' records, and say the last round's comparison."""
    rounds = read_rounds(folder)
    write_json(folder / "report.json", rounds)
    write_text(folder / "report.md", _markdown(rounds))
    if rounds:
        compared = rounds[-1]["stages"].get("compare", {})
        if "rate" in compared.get("figures", {}):
            of = compared["settings"].get("compare", {}).get("against", "last")
            rate = _win_rate(compared["figures"])
            say(f"round {rounds[-1]['round']} against the {_AGAINST[of]}: {rate}")


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """Each round's number and its stages by name, with seconds, figures, inputs and outputs."""
    rounds = []
    # Others, such as copies that a person keeps, are left alone.
    places = [path for path in folder.glob("round_*") if path.name[6:].isdecimal()]
    for place in sorted(places, key=lambda path: int(path.name[6:])):
        records = sorted(place.glob(f"*/{_DONE_FILE}"), key=_order)
        stages = [json.loads(record.read_text(encoding="utf-8")) for record in records]
        rounds.append(
            {"round": int(place.name[6:]), "stages": {stage["stage"]: stage for stage in stages}}
        )
    return rounds


def _order(record: Path) -> int:
    return int(record.parent.name.partition("_")[0])


def _markdown(rounds: list[dict[str, Any]]) -> str:
    lines = ["| round | stage | figures | seconds |", "| --- | --- | --- | --- |"]
    for each in rounds:
        for name, stage in each["stages"].items():
            told = "; ".join(_told(stage["figures"]))
            if "skipped" in stage:
                told = f"skipped: {stage['skipped']}"
            lines.append(f"| {each['round']} | {name} | {told} | {stage['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def _told(figures: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each figure as `name value`; of a curve its first and last."""
    if "rate" in figures and "low" in figures:
        yield f"win rate {_win_rate(figures)}"
        return
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _told(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], float):
            yield f"{prefix}{name} {value[0]:.4g} to {value[-1]:.4g}"
        elif isinstance(value, bool | int | str):
            yield f"{prefix}{name} {value}"
        elif isinstance(value, float):
            yield f"{prefix}{name} {value:.4g}"


def _win_rate(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['rate']:.3f} ({figures['low']:.3f} to {figures['high']:.3f}), "
        f"{figures['wins']} wins, {figures['ties']} ties, {figures['losses']} losses"
    )
