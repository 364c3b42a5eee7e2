"""JSON objects from disk, with one line for what is wrong with them."""

import json
from pathlib import Path
from typing import Any

from llama_jax.interchange.tensors import InterchangeError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
      InterchangeError: absent, malformed, or not an object.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InterchangeError(f"{path}: no such file") from None
    except ValueError as error:
        raise InterchangeError(f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise InterchangeError(f"{path}: not a JSON object")
    return table


def write_json(path: Path, table: dict[str, Any]) -> None:
    """An object to a file, its keys in the order given."""
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
