"""A run's directory: where it is, and its small files.

They are renamed into place: a run that is killed leaves no half of one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath

CONFIG_FILE, RUN_FILE, RESULT_FILE = "config.toml", "run.json", "result.json"
CHECKPOINTS_FOLDER, TOKENIZER_FOLDER = "checkpoints", "tokenizer"
# The fingerprints of the models that a run reads again when it goes on, by key of its config.
ORIGINS_FILE = "origins.json"
# Before the name of a run: its model, in a field that names a checkpoint.
RUN = "run:"


def default_run_dir(name: str) -> Path:
    """`runs/<name>` for a run's file or shipped name; of a run's own `config.toml`, its folder."""
    path = Path(name)
    if path.name == CONFIG_FILE and (path.parent / RUN_FILE).is_file():
        return path.parent
    # Names of shipped runs have dots of their own: llama3.2-1b-v5e-1.
    return Path("runs") / path.name.removesuffix(".toml")


def run_named(path: str | Path) -> str | None:
    """NAME where a checkpoint is given as `run:NAME`."""
    name = str(path)
    return name.removeprefix(RUN) if name.startswith(RUN) else None


def checkpoint_path(path: str | Path) -> Path:
    """Where the checkpoint lies: that of `run:debug/sft` in the folder of that run, `runs/sft`."""
    name = run_named(path)
    return Path(path) if name is None else default_run_dir(name)


def write_json(path: "Path | epath.Path", table: Mapping[str, Any] | list[Any]) -> None:
    """As text that a person can read, too."""
    write_text(path, json.dumps(table, indent=2) + "\n")


def write_text(path: "Path | epath.Path", text: str) -> None:
    """In place of what is there; the folder is made where it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.new"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)  # pyright: ignore[reportArgumentType]
