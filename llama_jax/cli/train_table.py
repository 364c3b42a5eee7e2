"""What `llama-jax train` prints at its end: figures, what was made and where, what to try next."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from etils import epath
from rich.console import Console
from rich.table import Table

from llama_jax.config.files import load_run_config
from llama_jax.metrics.progress import format_bytes, format_count, format_duration
from llama_jax.training.run import Outcome

MADE = (
    ("checkpoints", "state and data position; training goes on from them"),
    ("tokenizer", "the vocabulary"),
    ("data", "the tokenised text"),
    ("metrics.jsonl", "an object a step"),
    ("tensorboard", "the same for TensorBoard"),
    ("plots/loss.png", "the loss curve"),
    ("plots/figures.png", "what else the steps tell"),
    ("samples_before.txt", "what the model wrote before the first step"),
    ("samples.txt", "what the model writes"),
    ("config.toml", "the resolved config"),
    ("run.json", "fingerprint, versions, git state of every start"),
    ("result.json", "the figures above"),
)


def show_outcome(outcome: Outcome, console: Console) -> None:
    """Print the tables."""
    if outcome.figures is None:
        # The resolved config, which has the --set changes of this start in it.
        folder = shlex.quote(_shown(outcome.run_dir))
        again = f"llama-jax train {folder}/config.toml --run-dir {folder}"
        console.print(f"stopped after step {outcome.step}, saved; go on with\n  {again}",
                      highlight=False, soft_wrap=True)  # fmt: skip
        return
    if outcome.already_done:
        console.print(
            f"this run is done: step {outcome.step} of {outcome.step}; a larger training.steps "
            "goes on, another --run-dir begins anew",
            highlight=False,
            soft_wrap=True,
        )
    console.print(_figures_table(outcome))
    console.print(_made_table(outcome.run_dir))
    console.print(_next_commands(outcome.run_dir), highlight=False, soft_wrap=True)


def _figures_table(outcome: Outcome) -> Table:
    figures = outcome.figures or {}
    table = Table(title="figures", title_justify="left", show_header=False)
    table.add_row("parameters", format_count(figures["parameters"]))
    table.add_row("target tokens trained on", format_count(figures["target_tokens"]))
    if figures["loss"] is not None:  # its records may have been thrown away
        table.add_row("training loss, last step", f"{figures['loss']:.4f}")
    held_out = figures["held_out"]
    if held_out is not None:
        _add_held_out(table, held_out)
        for name, value in (figures["compressors"] or {}).items():
            table.add_row(f"held-out bits a byte, {name}, files joined", f"{value:.3f}")
    seconds = figures["seconds"]
    table.add_row("time", format_duration(seconds["with_preparation"]))
    table.add_row("goodput of the loop", f"{seconds.get('step', 0.0) / seconds['total']:.1%}")
    return table


def _add_held_out(table: Table, held_out: Mapping[str, float]) -> None:
    rest = dict(held_out)
    loss, bits = rest.pop("loss"), rest.pop("bits_per_byte", None)
    if bits is None:
        table.add_row("held-out loss", f"{loss:.4f}")
    else:
        table.add_row("held-out loss, nats a token", f"{loss:.4f}")
        table.add_row("held-out bits a byte, this model", f"{bits:.3f}")
    for name, value in rest.items():
        if name not in ("tokens", "text_bytes"):
            table.add_row(f"held-out {name.replace('_', ' ')}", f"{value:.4g}")


def _made_table(run_dir: epath.Path) -> Table:
    table = Table(title="what was made", title_justify="left")
    for heading in ("where", "what", "size"):
        table.add_column(heading, overflow="fold")
    for name, what in MADE:
        path = run_dir / name
        if path.exists():
            table.add_row(_shown(path), what, format_bytes(_size(path)))
    return table


def _write_command(run_dir: epath.Path, folder: str) -> str:
    """How to let the model write, by what it was trained on; nothing for a reward model."""
    config = load_run_config(os.fspath(run_dir / "config.toml"))
    if config.model.head != "vocab":
        return ""
    if config.data.kind == "text":
        return f"  llama-jax generate --model {folder} --prompt 'def main():'\n"
    return f"  llama-jax chat --model {folder}\n"


def _shown(path: epath.Path) -> str:
    """The path as a person would type it here: below the working directory without that."""
    here = f"{Path.cwd()}/"
    return os.fspath(path).removeprefix(here)


def _size(path: epath.Path) -> int:
    if not path.is_dir():
        return path.stat().length
    return sum(_size(child) for child in path.iterdir())


def _next_commands(run_dir: epath.Path) -> str:
    folder = shlex.quote(_shown(run_dir))
    samples = f"  cat {folder}/samples.txt\n" if (run_dir / "samples.txt").exists() else ""
    return (
        f"next:\n{samples}{_write_command(run_dir, folder)}"
        f"  tensorboard --logdir {folder}/tensorboard\n"
        f"  llama-jax data inspect {folder}/config.toml\n"
        f"  llama-jax tokenizer encode --tokenizer {folder}/tokenizer 'def main():'\n"
        "  llama-jax doctor"
    )
