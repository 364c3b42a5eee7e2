"""How a `tokenizer.json` spells its ids, by the decoder that it names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.tokenizers.hugging_face import byte_letters
from llama_jax.tokenizers.spelling import Spelling
from llama_jax.tokenizers.tokenizer import TokenizerError

_SPACE = "\u2581"
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def make_spelling(
    parts: Mapping[str, Any], vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]]
) -> Spelling:
    """The spelling of a vocabulary.

    Args:
      parts: `decoder` and `model` of `tokenizer.json`.
      vocab: ids by token, added ones included.
      added: the entries of `added_tokens`.

    Raises:
      TokenizerError: a decoder that is not known.
    """
    steps = list(_steps(parts.get("decoder")))
    kinds = [step["type"] for step in steps]
    names = {token["id"]: token["content"] for token in added if token["special"]}
    plain = {token["id"]: token["content"].encode() for token in added}
    if kinds == ["ByteLevel"]:
        return Spelling(_pieces(_byte_level(vocab), plain), names)
    if not kinds or not set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        known = "ByteLevel; Metaspace; Replace, ByteFallback, Fuse, Strip"
        raise TokenizerError(f"decoder {kinds or None} is not known (known: {known})")
    bytes_of = _bytes(vocab) if "ByteFallback" in kinds else {}
    spelled = {i: token.replace(_SPACE, " ").encode() for token, i in vocab.items()}
    leading = "first" if any(map(_strips, steps)) else "kept"
    pieces = _pieces({**spelled, **bytes_of}, plain)
    return Spelling(pieces, names, leading, frozenset(bytes_of), "each_byte")


def _steps(decoder: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for step in decoder["decoders"]:
        yield from _steps(step)


def _strips(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        scheme = "always" if step.get("add_prefix_space", True) else "never"
        return step.get("prepend_scheme", scheme) != "never"
    return step["type"] == "Strip" and step["content"] == " " and step["start"] > 0


def _byte_level(vocab: Mapping[str, int]) -> dict[int, bytes]:
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    spelled = {}
    for token, i in vocab.items():
        known = all(letter in bytes_of for letter in token)
        spelled[i] = bytes(map(bytes_of.__getitem__, token)) if known else token.encode()
    return spelled


def _bytes(vocab: Mapping[str, int]) -> dict[int, bytes]:
    matches = {i: BYTE_PIECE.fullmatch(token) for token, i in vocab.items()}
    return {i: bytes([int(match[1], 16)]) for i, match in matches.items() if match}


def _pieces(spelled: Mapping[int, bytes], added: Mapping[int, bytes]) -> list[bytes]:
    """By id; ids that no token has are spelled as nothing."""
    every = {**spelled, **added}
    return [every.get(i, b"") for i in range(1 + max(every))]
