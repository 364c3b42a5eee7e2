"""The vocabulary in GGUF metadata, both ways: keys `tokenizer.ggml.*`, values plain Python."""

from collections.abc import Mapping
from typing import Any

from llama_jax.tokenizers.tokenizer import Tokenizer, TokenizerError


def from_gguf_fields(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata.

    Args:
      fields: by key; lists, str, int and bool. Keys other than `tokenizer.ggml.*` are not read.

    Raises:
      TokenizerError: a missing field, or a model or pre-tokenizer that is not known.
    """
    raise TokenizerError(f"tokenizer.ggml.model: {fields.get('tokenizer.ggml.model')!r} not known")


def to_gguf_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata that gives llama.cpp, and `from_gguf_fields`, the same ids.

    Raises:
      TokenizerError: it can't be expressed there; one line says why.
    """
    raise TokenizerError(f"{type(tokenizer).__name__} has no GGUF form")
