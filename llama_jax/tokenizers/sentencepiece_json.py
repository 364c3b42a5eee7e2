"""A SentencePiece vocabulary as Hugging Face's `tokenizer.json`, with the same ids.

Merges are every pair of pieces that makes a piece, best score first; see `merges`.
"""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.tokenizers.hugging_face import (
    CONFIG_FILE,
    added_token,
    added_tokens_decoder,
    bos_template,
    role_names,
)
from llama_jax.tokenizers.merges import merges_of
from llama_jax.tokenizers.sentencepiece_proto import (
    NORMAL,
    SPACE,
    UNUSED,
    USER_DEFINED,
)
from llama_jax.tokenizers.tokenizer import TokenizerError

if TYPE_CHECKING:
    from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer

# Our key beside Hugging Face's: `tokenizer.model` holds the vocabulary, the rest follows from it.
VOCABULARY_KEY = "llama_jax_vocabulary"


def save_hugging_face(tokenizer: "SentencePieceTokenizer", folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`.

    Raises:
      TokenizerError: the model normalises text in a way that `tokenizer.json` can't express.
    """
    definition = json.dumps(make_definition(tokenizer), ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    config = json.dumps(_config_table(tokenizer), ensure_ascii=False, indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")


def make_definition(tokenizer: "SentencePieceTokenizer") -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Raises:
      TokenizerError: see `save_hugging_face`.
    """
    names = {i: name for name, i in tokenizer.special.items()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, names[i]) for i in sorted(names)],
        "normalizer": _normalizer(tokenizer.model.normalizer_spec),
        "pre_tokenizer": _pre_tokenizer(tokenizer),
        "post_processor": bos_template(names[tokenizer.bos_id], tokenizer.bos_id)
        if tokenizer.adds_bos
        else None,
        "decoder": _decoder(tokenizer),
        "model": _bpe(tokenizer),
    }


def _normalizer(spec: Any) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    if not spec.escape_whitespaces:
        raise TokenizerError("the SentencePiece model keeps spaces; tokenizer.json can't follow it")
    return {"type": "Sequence", "normalizers": [*steps, _replace({"String": " "}, SPACE)]}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _pre_tokenizer(tokenizer: "SentencePieceTokenizer") -> dict[str, Any] | None:
    """User-defined pieces are cut out before merging; the text between them stays whole."""
    pieces = _of_type(tokenizer, USER_DEFINED)
    if not pieces:
        return None
    pattern = "|".join(map(re.escape, sorted(pieces, key=len, reverse=True)))
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _decoder(tokenizer: "SentencePieceTokenizer") -> dict[str, Any]:
    steps = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.spelling.leading != "kept":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _bpe(tokenizer: "SentencePieceTokenizer") -> dict[str, Any]:
    pieces, trainer = tokenizer.model.pieces, tokenizer.model.trainer_spec
    normal = _of_type(tokenizer, NORMAL)
    merges = merges_of(sorted(normal, key=lambda name: (-normal[name], len(name))), normal)
    _check_unused(tokenizer, normal)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[trainer.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": trainer.byte_fallback,
        # A user-defined piece, cut out, is a token by itself.
        "ignore_merges": bool(_of_type(tokenizer, USER_DEFINED)),
        "vocab": {piece.piece: i for i, piece in enumerate(pieces)},
        "merges": [list(pair) for pair in merges],
    }


def _check_unused(tokenizer: "SentencePieceTokenizer", normal: Mapping[str, float]) -> None:
    """SentencePiece splits unused pieces again after merging them."""
    unused = _of_type(tokenizer, UNUSED)
    if merges_of(unused, {**normal, **unused}):
        raise TokenizerError("the SentencePiece model has unused pieces that its merges can reach")


def _of_type(tokenizer: "SentencePieceTokenizer", kind: int) -> dict[str, float]:
    """Pieces of a kind that are no special tokens, with their scores."""
    return {
        piece.piece: piece.score
        for i, piece in enumerate(tokenizer.model.pieces)
        if piece.type == kind and tokenizer.special.get(piece.piece) != i
    }


def _config_table(tokenizer: "SentencePieceTokenizer") -> dict[str, Any]:
    unk = tokenizer.model.pieces[tokenizer.model.trainer_spec.unk_id].piece
    return {
        # transformers' LlamaTokenizer would build its own and drop a second leading space.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **role_names(tokenizer),
        "unk_token": unk,
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": added_tokens_decoder(tokenizer),
        VOCABULARY_KEY: "sentencepiece",
    }
