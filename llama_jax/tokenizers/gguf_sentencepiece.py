"""GGUF's `llama` vocabularies: the pieces of a SentencePiece BPE model with scores and types."""

from collections.abc import Mapping
from typing import Any

from llama_jax.tokenizers import sentencepiece_proto
from llama_jax.tokenizers.gguf_fields import KEY, field, role_fields, role_id
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from llama_jax.tokenizers.sentencepiece_proto import BYTE, CONTROL, NORMAL, UNKNOWN
from llama_jax.tokenizers.tokenizer import TokenizerError

# llama.cpp's, where a file doesn't say it.
_DEFAULT_IDS = {"unk": 0, "bos": 1, "eos": 2, "pad": None}
# Below every piece that was trained, as llama.cpp's converter writes it for added tokens.
_ADDED_SCORE = -1000.0


def from_fields(fields: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The tokenizer of a `llama` vocabulary whose fields have been checked.

    Raises:
      TokenizerError: a missing field, or pieces that SentencePiece refuses.
    """
    tokens = field(fields, "tokens")
    scores, types = field(fields, "scores"), field(fields, "token_type")
    model = sentencepiece_proto.new_model()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        # 0 is llama.cpp's `undefined`; the others are SentencePiece's own numbers.
        model.pieces.add(piece=token, score=score, type=kind or NORMAL)
    _set_roles(model, {role: role_id(fields, role) for role in _DEFAULT_IDS})
    model.trainer_spec.model_type = sentencepiece_proto.BPE
    model.trainer_spec.vocab_size = len(tokens)
    model.trainer_spec.byte_fallback = BYTE in types
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(fields.get(KEY + "add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    adds_bos = bool(fields.get(KEY + "add_bos_token", True))
    return SentencePieceTokenizer(model.SerializeToString(deterministic=True), adds_bos=adds_bos)


def _set_roles(model: Any, ids: Mapping[str, int | None]) -> None:
    for role, default in _DEFAULT_IDS.items():
        token_id = default if ids[role] is None else ids[role]
        if token_id is None:
            setattr(model.trainer_spec, f"{role}_id", -1)
            continue
        if token_id >= len(model.pieces):
            raise TokenizerError(f"{KEY}tokens: no {role} token, whose id is {token_id} by default")
        piece = model.pieces[token_id]
        setattr(model.trainer_spec, f"{role}_id", token_id)
        setattr(model.trainer_spec, f"{role}_piece", piece.piece)
        if role == "unk":
            piece.type = UNKNOWN
        elif piece.type != UNKNOWN:
            piece.type = CONTROL


def to_fields(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The fields of a SentencePiece vocabulary.

    Raises:
      TokenizerError: llama.cpp has no such thing: normalised text, or text without byte fallback.
    """
    normalizer = tokenizer.model.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise TokenizerError("this SentencePiece model normalises text, llama.cpp would not")
    if not tokenizer.model.trainer_spec.byte_fallback:
        raise TokenizerError("a SentencePiece model without byte fallback has no form in GGUF")
    pieces = sentencepiece_proto.parse_model(tokenizer.encoding_proto).pieces
    added = sorted(tokenizer.special.items(), key=lambda item: item[1])
    beyond = [name for name, i in added if i >= len(pieces)]
    return {
        KEY + "model": "llama",
        KEY + "pre": "default",
        KEY + "tokens": [*(piece.piece for piece in pieces), *beyond],
        KEY + "scores": [*(piece.score for piece in pieces), *[_ADDED_SCORE] * len(beyond)],
        KEY + "token_type": [*(piece.type for piece in pieces), *[CONTROL] * len(beyond)],
        **role_fields(tokenizer, unk=tokenizer.model.trainer_spec.unk_id),
        KEY + "add_space_prefix": normalizer.add_dummy_prefix,
    }
