"""Small files of a run's directory, renamed into place: a run that is killed leaves no half."""

import json
from typing import Any

from etils import epath


def write_json(path: epath.Path, table: dict[str, Any]) -> None:
    """As text that a person can read, too."""
    write_text(path, json.dumps(table, indent=2) + "\n")


def write_text(path: epath.Path, text: str) -> None:
    """In place of what is there."""
    temporary = path.parent / f"{path.name}.new"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
