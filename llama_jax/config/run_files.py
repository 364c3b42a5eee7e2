"""Small files of a run's directory, renamed into place: a run that is killed leaves no half."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath


def write_json(path: "Path | epath.Path", table: Mapping[str, Any] | list[Any]) -> None:
    """As text that a person can read, too."""
    write_text(path, json.dumps(table, indent=2) + "\n")


def write_text(path: "Path | epath.Path", text: str) -> None:
    """In place of what is there; the folder is made where it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.new"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)  # pyright: ignore[reportArgumentType]
