"""Whether checkpoints can be averaged: one architecture, one tokenizer, or what differs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llama_jax.config.model import ModelConfig
from llama_jax.interchange.source import InterchangeError, Source
from llama_jax.tokenizers import Tokenizer

# How a model was once initialised says nothing about what it computes.
_OF_NO_ACCOUNT = frozenset({"init_std"})


def check_alike(sources: Sequence[Source], *, tokenizers: bool = True) -> Tokenizer | None:
    """The tokenizer of all of them; None where tokenizers are left out.

    Raises:
      InterchangeError: one that differs from the first; names both and what differs.
      TokenizerError: a tokenizer that can't be read.
    """
    first = sources[0]
    for other in sources[1:]:
        found = config_difference(first.config, other.config)
        if found is not None:
            raise InterchangeError(f"{other.path}: {found} of {first.path}: another architecture")
    if not tokenizers:
        return None
    tokenizer = first.load_tokenizer()
    for other in sources[1:]:
        found = tokenizer_difference(tokenizer, other.load_tokenizer())
        if found is not None:
            raise InterchangeError(f"{other.path}: another tokenizer than {first.path}: {found}")
    return tokenizer


def config_difference(one: ModelConfig, other: ModelConfig) -> str | None:
    """`embed_dim is 64, not 32 as that` of the first field that differs, or None."""
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if ours != theirs and field.name not in _OF_NO_ACCOUNT:
            return f"{field.name} is {_shown(theirs)}, not {_shown(ours)} as that"
    return None


def tokenizer_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """What makes some text's ids differ, or None; the second's value comes first."""
    if one.fingerprint == other.fingerprint:
        return None
    if one.vocab_size != other.vocab_size:
        return f"{other.vocab_size} ids, not {one.vocab_size}"
    for name in sorted(one.special.keys() | other.special.keys()):
        ours, theirs = one.special.get(name), other.special.get(name)
        if ours != theirs:
            return f"{name} is {_id(theirs)}, not {_id(ours)}"
    for token_id in range(one.vocab_size):
        ours, theirs = one.decode([token_id]), other.decode([token_id])
        if ours != theirs:
            return f"id {token_id} is {theirs!r}, not {ours!r}"
    return "the same ids by other rules of splitting text; convert both to one format to compare"


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)


def _id(token_id: int | None) -> str:
    return "no token" if token_id is None else f"id {token_id}"
