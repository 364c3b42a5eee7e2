"""What both models of GGUF vocabularies share: reading fields, checking them, special ids."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.tokenizers.tokenizer import Tokenizer, TokenizerError

KEY = "tokenizer.ggml."
# Our roles and GGUF's names for them.
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_LISTS = ("tokens", "token_type", "scores")


def field(fields: Mapping[str, Any], name: str) -> Any:
    """The value of `tokenizer.ggml.<name>`.

    Raises:
      TokenizerError: it is missing.
    """
    if KEY + name not in fields:
        raise TokenizerError(f"the GGUF metadata has no {KEY}{name}")
    return fields[KEY + name]


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise `TokenizerError` for lists of other lengths, a token given twice, an id of none."""
    tokens: Sequence[str] = field(fields, "tokens")
    for name in _LISTS:
        values = fields.get(KEY + name, tokens)
        if len(values) != len(tokens):
            raise TokenizerError(f"{KEY}{name} has {len(values)} values for {len(tokens)} tokens")
    if len(set(tokens)) != len(tokens):
        twice, _ = collections.Counter(tokens).most_common(1)[0]
        raise TokenizerError(f"{KEY}tokens: {twice!r} occurs twice")
    for name in ROLES.values():
        token_id = fields.get(f"{KEY}{name}_token_id")
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise TokenizerError(
                f"{KEY}{name}_token_id: {token_id} is outside the vocabulary of {len(tokens)}"
            )


def role_id(fields: Mapping[str, Any], role: str) -> int | None:
    """The id of the `bos`, `eos`, `unk` or `pad` token, or None."""
    return fields.get(f"{KEY}{ROLES[role]}_token_id")


def role_fields(tokenizer: Tokenizer, **known: int | None) -> dict[str, Any]:
    """The ids of special tokens, those that there are, and whether prompts begin with BOS.

    Args:
      tokenizer: names the begin, end and padding tokens.
      known: ids by role that it doesn't name, or names for none of its own uses.

    Raises:
      TokenizerError: no end token, without which llama.cpp takes the token 11 for it.
    """
    ids = {"bos": _id_of(tokenizer, "bos"), "eos": tokenizer.eos_id, "pad": None, **known}
    if ids["pad"] is None:
        ids["pad"] = _id_of(tokenizer, "pad")
    found = {f"{KEY}{ROLES[role]}_token_id": i for role, i in ids.items() if i is not None}
    return {**found, f"{KEY}add_bos_token": tokenizer.adds_bos, f"{KEY}add_eos_token": False}


def _id_of(tokenizer: Tokenizer, role: str) -> int | None:
    try:
        return getattr(tokenizer, f"{role}_id")
    except TokenizerError:
        return None
