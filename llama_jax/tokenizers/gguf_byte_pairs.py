"""GGUF's `gpt2` vocabularies: byte-level BPE with merges and a named pre-tokenizer.

Read, they become a `tokenizer.json`. A byte that has no token leaves no id, as in llama.cpp and in
`tokenizers`: SmolLM2 lacks eight bytes that occur in UTF-8.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.gguf_fields import KEY, field, role_fields, role_id
from llama_jax.tokenizers.gguf_pre_tokenizers import name_of, pre_tokenizer, to_json
from llama_jax.tokenizers.hugging_face import (
    added_token,
    bos_template,
    byte_letters,
    vocab_and_merges,
)
from llama_jax.tokenizers.hugging_face_json import HuggingFaceTokenizer
from llama_jax.tokenizers.sentencepiece_proto import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from llama_jax.tokenizers.tiktoken import TiktokenTokenizer
from llama_jax.tokenizers.tokenizer import Tokenizer, TokenizerError

# llama.cpp wants merges, gguf can't write an empty list: the byte 255 never occurs in UTF-8.
_NO_MERGES = ["ÿ ÿ"]
_LETTERS_DECODER = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}


def from_fields(fields: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """The tokenizer of a `gpt2` vocabulary whose fields have been checked.

    Raises:
      TokenizerError: a missing field, an unknown pre-tokenizer, a merge of no tokens.
    """
    kind = pre_tokenizer(fields.get(KEY + "pre", "default"))
    tokens, adds_bos = field(fields, "tokens"), fields.get(KEY + "add_bos_token", kind.adds_bos)
    added = _added(fields, tokens)
    names = {
        f"{role}_token": tokens[i]
        for role in ("bos", "eos", "unk", "pad")
        if (i := role_id(fields, role)) is not None
    }
    bos_id = role_id(fields, "bos")
    if adds_bos and bos_id is None:
        raise TokenizerError(f"{KEY}add_bos_token is set, and there is no {KEY}bos_token_id")
    begin = bos_template(tokens[bos_id], bos_id) if adds_bos and bos_id is not None else None
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": to_json(kind),
        "post_processor": begin,
        "decoder": _LETTERS_DECODER,
        "model": _bpe(fields, tokens, added, whole_words=kind.whole_words),
    }
    text = json.dumps(definition, ensure_ascii=False, indent=2) + "\n"
    return HuggingFaceTokenizer(text, {**names, "add_bos_token": bool(adds_bos)})


def _added(fields: Mapping[str, Any], tokens: Sequence[str]) -> list[dict[str, Any]]:
    types = fields.get(KEY + "token_type", [NORMAL] * len(tokens))
    roles = {role_id(fields, role) for role in ("bos", "eos", "pad")}
    return [
        added_token(i, tokens[i], special=kind != USER_DEFINED or i in roles)
        for i, kind in enumerate(types)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) or i in roles
    ]


def _bpe(
    fields: Mapping[str, Any],
    tokens: Sequence[str],
    added: Sequence[Mapping[str, Any]],
    *,
    whole_words: bool,
) -> dict[str, Any]:
    # Added tokens at the end stay out of the model, where a word of text could be looked up.
    end, ids = len(tokens), {token["id"] for token in added}
    while end - 1 in ids:
        end -= 1
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": whole_words,
        "vocab": {token: i for i, token in enumerate(tokens[:end])},
        "merges": _merges(field(fields, "merges"), set(tokens[:end])),
    }


def _merges(lines: Sequence[str], tokens: set[str]) -> list[list[str]]:
    if list(lines) == _NO_MERGES and _NO_MERGES[0].replace(" ", "") not in tokens:
        return []
    merges = [line.split(" ") for line in lines]
    for line, pair in zip(lines, merges, strict=True):
        if len(pair) != 2 or not {*pair, "".join(pair)} <= tokens:
            raise TokenizerError(f"{KEY}merges: '{line}' doesn't join two tokens to one")
    return merges


def from_tiktoken(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    """The fields of a tiktoken vocabulary; merges are worked out from the ranks."""
    vocab, merges = vocab_and_merges(tokenizer.ranks)
    special = dict.fromkeys(tokenizer.special, CONTROL)
    ids = {**vocab, **tokenizer.special}
    return _fields(tokenizer, ids, special, [f"{a} {b}" for a, b in merges], "llama-bpe")


def from_bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """The fields of the byte vocabulary: no merges, and any pre-tokenizer will do."""
    letters = {letter: byte for byte, letter in byte_letters().items()}
    special = dict.fromkeys(tokenizer.special, CONTROL)
    return _fields(tokenizer, {**letters, **tokenizer.special}, special, [], "gpt-2")


def from_hugging_face(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    """The fields of a byte-level `tokenizer.json`.

    Raises:
      TokenizerError: another model, a normaliser, or a pre-tokenizer that GGUF has no name for.
    """
    definition = json.loads(tokenizer.definition)
    model = definition["model"]
    _check_byte_level(tokenizer.parts)
    name = name_of(definition["pre_tokenizer"])
    if model["merges"] and isinstance(model["merges"][0], str):
        merges = model["merges"]
    else:
        merges = [" ".join(pair) for pair in model["merges"]]
    if bool(model.get("ignore_merges")) != pre_tokenizer(name).whole_words:
        _check_reached(tokenizer, model["vocab"])
    types = {t["content"]: CONTROL if t["special"] else USER_DEFINED for t in tokenizer.added}
    ids = {**model["vocab"], **{t["content"]: t["id"] for t in tokenizer.added}}
    roles = {role: tokenizer.role(role) for role in ("unk", "pad")}
    return _fields(tokenizer, ids, types, merges, name, **roles)


def _check_byte_level(parts: Mapping[str, Any]) -> None:
    model = parts["model"]
    if model["type"] != "BPE" or (parts.get("decoder") or {}).get("type") != "ByteLevel":
        raise TokenizerError(f"a {model['type']} model that is not byte-level has no form in GGUF")
    if parts.get("normalizer") is not None:
        kind = parts["normalizer"]["type"]
        raise TokenizerError(f"the normalizer {kind} has no form in GGUF; llama.cpp would skip it")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise TokenizerError("affixes of subwords have no form in GGUF")
    for token in parts["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise TokenizerError(
                f"added token '{token['content']}' takes the space beside it; GGUF can't say that"
            )


def _check_reached(tokenizer: HuggingFaceTokenizer, vocab: Mapping[str, int]) -> None:
    """Looking up whole words or not is the same where merging makes every token."""
    for token in _unreached(tokenizer, vocab):
        raise TokenizerError(
            f"token '{token}' is found with ignore_merges only one way; GGUF's pre-tokenizer"
            " of this pattern is the other way"
        )


def _unreached(tokenizer: HuggingFaceTokenizer, vocab: Mapping[str, int]) -> Iterable[str]:
    from tokenizers import models

    model = json.loads(tokenizer.definition)["model"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merging = models.BPE(vocab=dict(vocab), merges=[(a, b) for a, b in merges])
    added = {token["content"] for token in tokenizer.added}
    return (t for t in vocab if t not in added and len(merging.tokenize(t)) != 1)


def _fields(
    tokenizer: Tokenizer,
    ids: Mapping[str, int],
    types: Mapping[str, int],
    merges: Sequence[str],
    pre: str,
    **roles: int | None,
) -> dict[str, Any]:
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    kinds = [UNUSED] * len(tokens)
    for token, i in ids.items():
        tokens[i], kinds[i] = token, types.get(token, NORMAL)
    return {
        KEY + "model": "gpt2",
        KEY + "pre": pre,
        KEY + "tokens": tokens,
        KEY + "token_type": kinds,
        KEY + "merges": list(merges) or _NO_MERGES,
        **role_fields(tokenizer, **roles),
        KEY + "add_space_prefix": False,
    }
