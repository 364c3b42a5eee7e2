"""Any tokenizer from disk, by file or folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.tokenizers.byte import BYTE_CLASS, ByteTokenizer
from llama_jax.tokenizers.hugging_face import CONFIG_FILE, CUT_KEY, special_from_config
from llama_jax.tokenizers.hugging_face_json import DEFINITION_FILE, HuggingFaceTokenizer, name_of
from llama_jax.tokenizers.json_files import read_table
from llama_jax.tokenizers.sentencepiece import Role, SentencePieceTokenizer
from llama_jax.tokenizers.sentencepiece_proto import parse_model
from llama_jax.tokenizers.tiktoken import MODEL_FILE, load_tiktoken
from llama_jax.tokenizers.tokenizer import Tokenizer, TokenizerError

BYTE_NAME = "byte"
_SPECIAL_MAP_FILE, _ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
_ROLES: tuple[Role, ...] = ("bos", "eos", "pad")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a file, the folder that holds it, or the name `byte`.

    Files are `tokenizer.model` of either kind (tiktoken, SentencePiece), `tokenizer.json`, or a
    GGUF file; `tokenizer_config.json` beside them names special tokens. In a folder with both,
    a SentencePiece `tokenizer.model` goes before `tokenizer.json`, which was made from it, unless
    tokens were added that don't fit it. A tiktoken file holds neither its pattern nor its special
    tokens, so there `tokenizer.json` goes first, unless llama_jax wrote both. A tiktoken file alone
    is taken for Llama 3's: 256 special tokens after the ordinary ones.

    Raises:
      TokenizerError: nothing there, or not in a form that is known.
    """
    path = Path(path)
    if str(path) == BYTE_NAME and not path.exists():
        return ByteTokenizer()
    if path.suffix == ".gguf":
        return _load_gguf(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file")
    table = _read_config(path.parent)
    if table.get("tokenizer_class") == BYTE_CLASS:
        return ByteTokenizer()
    return _load_definition(path, table) if path.suffix == ".json" else _load_model(path, table)


def _load_folder(folder: Path) -> Tokenizer:
    table = _read_config(folder)
    if table.get("tokenizer_class") == BYTE_CLASS:
        return ByteTokenizer()
    model, definition = folder / MODEL_FILE, folder / DEFINITION_FILE
    if not model.is_file() and not definition.is_file():
        raise TokenizerError(f"{folder}: holds neither {MODEL_FILE} nor {DEFINITION_FILE}")
    if not definition.is_file():
        return _load_model(model, table)
    if not model.is_file() or not (CUT_KEY in table or _is_sentencepiece(model)):
        return _load_definition(definition, table)
    try:
        return _load_model(model, _with_added_tokens(table, definition))
    except TokenizerError:
        # Added tokens that don't fit the model are the definition's to tell; a model that can't
        # be read by itself either is broken, and taking the other file would hide it.
        _load_model(model, {})
        return _load_definition(definition, table)


def _load_model(model: Path, table: Mapping[str, Any]) -> Tokenizer:
    if _is_sentencepiece(model):
        return _load_sentencepiece(model, table)
    special = special_from_config(table)
    return load_tiktoken(model, special, cut_long_text=bool(table.get(CUT_KEY, True)))


def _load_sentencepiece(model: Path, table: Mapping[str, Any]) -> SentencePieceTokenizer:
    adds_bos = bool(table.get("add_bos_token", True))
    try:
        proto = model.read_bytes()
        pieces = parse_model(proto).pieces
        added = {
            entry["content"]: int(i)
            for i, entry in table.get("added_tokens_decoder", {}).items()
            if entry.get("special") or int(i) >= len(pieces)
        }
        special = SentencePieceTokenizer(proto, added).special
        roles: dict[Role, str] = {}
        for role in _ROLES:
            # A name that no token has is passed over, as transformers' padding token often is.
            if (name := name_of(table.get(f"{role}_token"))) and name in special:
                roles[role] = name
        return SentencePieceTokenizer(proto, added, roles=roles, adds_bos=adds_bos)
    except TokenizerError as error:
        raise TokenizerError(f"{model}: {error}") from None


def _load_definition(path: Path, table: Mapping[str, Any]) -> HuggingFaceTokenizer:
    try:
        return HuggingFaceTokenizer(path.read_text(encoding="utf-8"), table)
    except (TokenizerError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: {error}") from None


def _load_gguf(path: Path) -> Tokenizer:
    from llama_jax.tokenizers.gguf_vocabulary import from_gguf_fields, read_gguf_fields

    try:
        return from_gguf_fields(read_gguf_fields(path))
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


def _is_sentencepiece(model: Path) -> bool:
    """Tiktoken's lines are base64; a SentencePiece file begins with the tag of its first piece."""
    with model.open("rb") as stream:
        return stream.read(1) == b"\n"


def _with_added_tokens(table: dict[str, Any], definition: Path) -> dict[str, Any]:
    """The special tokens of `tokenizer.json` too: newer files hold them only there."""
    try:
        tokens = json.loads(definition.read_text(encoding="utf-8")).get("added_tokens", [])
    except ValueError as error:
        raise TokenizerError(f"{definition}: {error}") from None
    found = {str(token["id"]): token for token in tokens}
    return {**table, "added_tokens_decoder": {**found, **table.get("added_tokens_decoder", {})}}


def _read_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with what older folders keep in files of their own."""
    table = {**read_table(folder / _SPECIAL_MAP_FILE), **read_table(folder / CONFIG_FILE)}
    if "added_tokens_decoder" not in table and (added := read_table(folder / _ADDED_FILE)):
        table["added_tokens_decoder"] = {
            str(token_id): {"content": name, "special": True} for name, token_id in added.items()
        }
    return table
