"""The JSON files beside a tokenizer."""

import json
from pathlib import Path
from typing import Any

from llama_jax.tokenizers.tokenizer import TokenizerError


def read_table(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no such file.

    Raises:
      TokenizerError: it is no JSON, or another value.
    """
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise TokenizerError(f"{path}: not a JSON object")
    return table
