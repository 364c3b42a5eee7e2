"""The vocabulary in GGUF metadata, both ways: keys `tokenizer.ggml.*`, values plain Python.

Two models: `gpt2`, byte-level BPE with merges and a named pre-tokenizer, and `llama`, SentencePiece
with scores. Each has its own module; this one tells them apart.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.tokenizers import gguf_byte_pairs, gguf_sentencepiece
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.gguf_fields import KEY, check_fields, field
from llama_jax.tokenizers.hugging_face_json import HuggingFaceTokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from llama_jax.tokenizers.sentencepiece_from_json import (
    is_sentencepiece_like,
    to_sentencepiece,
)
from llama_jax.tokenizers.tiktoken import TiktokenTokenizer
from llama_jax.tokenizers.tokenizer import Tokenizer, TokenizerError


def from_gguf_fields(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata.

    Args:
      fields: by key; lists, str, int and bool. Keys other than `tokenizer.ggml.*` are not read.

    Raises:
      TokenizerError: a field is missing or contradicts others, or the model or the pre-tokenizer is
        not known.
    """
    readers = {"gpt2": gguf_byte_pairs.from_fields, "llama": gguf_sentencepiece.from_fields}
    model = field(fields, "model")
    if model not in readers:
        raise TokenizerError(f"tokenizer.ggml.model: '{model}' is not known (known: gpt2, llama)")
    check_fields(fields)
    return readers[model](fields)


def to_gguf_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata from which llama.cpp and `from_gguf_fields` give the same ids.

    What the form can't hold: the cuts that Llama 3's reference makes in runs of more than 25,000
    characters.

    Raises:
      TokenizerError: it can't be expressed there; one line says why.
    """
    match tokenizer:
        case SentencePieceTokenizer():
            return gguf_sentencepiece.to_fields(tokenizer)
        case TiktokenTokenizer():
            return gguf_byte_pairs.from_tiktoken(tokenizer)
        case ByteTokenizer():
            return gguf_byte_pairs.from_bytes(tokenizer)
        case HuggingFaceTokenizer() if is_sentencepiece_like(tokenizer):
            return gguf_sentencepiece.to_fields(to_sentencepiece(tokenizer))
        case HuggingFaceTokenizer():
            return gguf_byte_pairs.from_hugging_face(tokenizer)
        case _:
            raise TokenizerError(f"{type(tokenizer).__name__} has no form in GGUF")


def read_gguf_fields(path: Path) -> dict[str, Any]:
    """The vocabulary's fields of a GGUF file, and nothing else of it.

    Raises:
      TokenizerError: not a GGUF file.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise TokenizerError(f"not a GGUF file: {error}") from None
    return {name: entry.contents() for name, entry in reader.fields.items() if name.startswith(KEY)}
