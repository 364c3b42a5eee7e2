"""Any tokenizer from disk, by file or folder."""

import json
from pathlib import Path
from typing import Any

from llama_jax.tokenizers.byte import BYTE_CLASS, ByteTokenizer
from llama_jax.tokenizers.hugging_face import CONFIG_FILE, CUT_KEY, special_from_config
from llama_jax.tokenizers.tiktoken import MODEL_FILE, load_tiktoken
from llama_jax.tokenizers.tokenizer import Tokenizer, TokenizerError

BYTE_NAME = "byte"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a `tokenizer.model` file, the folder that holds it, or `byte`.

    A file alone is taken for Llama 3's form: 256 special tokens after the ordinary ones.

    Raises:
      TokenizerError: nothing there, or not in a form that is known.
    """
    path = Path(path)
    if str(path) == BYTE_NAME and not path.exists():
        return ByteTokenizer()
    folder = path if path.is_dir() else path.parent
    table = _read_config(folder / CONFIG_FILE)
    if table.get("tokenizer_class") == BYTE_CLASS:
        return ByteTokenizer()
    model = path / MODEL_FILE if path.is_dir() else path
    if not model.is_file():
        raise TokenizerError(f"{model}: no such file")
    return load_tiktoken(
        model, special_from_config(table), cut_long_text=bool(table.get(CUT_KEY, True))
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise TokenizerError(f"{path}: not a JSON object")
    return table
