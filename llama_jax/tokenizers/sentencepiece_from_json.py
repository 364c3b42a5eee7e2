"""A SentencePiece model from a `tokenizer.json` that was made from one, where that is lost.

Scores are lost in `tokenizer.json`, but only their order decides the ids, and merges keep it.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.tokenizers import sentencepiece_proto
from llama_jax.tokenizers.hugging_face_json import HuggingFaceTokenizer
from llama_jax.tokenizers.hugging_face_spelling import BYTE_PIECE
from llama_jax.tokenizers.merges import merges_of
from llama_jax.tokenizers.sentencepiece import Role, SentencePieceTokenizer
from llama_jax.tokenizers.sentencepiece_proto import BYTE, NORMAL, SPACE, UNKNOWN
from llama_jax.tokenizers.tokenizer import TokenizerError

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_ROLES: tuple[Role, ...] = ("bos", "eos", "pad")
_REMEDY = "put the tokenizer.model that it was made from beside it"


def is_sentencepiece_like(tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether it is BPE with byte fallback."""
    model = tokenizer.parts["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def to_sentencepiece(tokenizer: HuggingFaceTokenizer) -> SentencePieceTokenizer:
    """The SentencePiece model with the same ids.

    Raises:
      TokenizerError: text is prepared, or merged, as SentencePiece would not.
    """
    _check_added(tokenizer)
    definition = json.loads(tokenizer.definition)["model"]
    model = sentencepiece_proto.new_model()
    model.trainer_spec.model_type = sentencepiece_proto.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = _has_prefix(tokenizer.parts)
    model.normalizer_spec.remove_extra_whitespaces = False
    _add_pieces(model, definition["vocab"], definition["merges"])
    unk_id = definition["vocab"][definition["unk_token"]]
    model.pieces[unk_id].type = UNKNOWN
    model.trainer_spec.unk_id, model.trainer_spec.unk_piece = unk_id, definition["unk_token"]
    for role in _ROLES:
        setattr(model.trainer_spec, f"{role}_id", -1)
    names = {i: name for name, i in tokenizer.special.items()}
    return SentencePieceTokenizer(
        model.SerializeToString(deterministic=True),
        tokenizer.special,
        roles={role: names[i] for role in _ROLES if (i := tokenizer.role(role)) is not None},
        adds_bos=tokenizer.adds_bos,
    )


def _check_added(tokenizer: HuggingFaceTokenizer) -> None:
    for token in tokenizer.added:
        if not token["special"]:
            name = token["content"]
            raise TokenizerError(f"tokenizer.json: '{name}' is added, but not special; {_REMEDY}")


def _add_pieces(model: Any, vocab: Mapping[str, int], merges: Sequence[Any]) -> None:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    scores = _scores([(first, second) for first, second in pairs])
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise TokenizerError(f"tokenizer.json: ids have gaps; {_REMEDY}")
    for token in sorted(vocab, key=vocab.__getitem__):
        kind = BYTE if BYTE_PIECE.fullmatch(token) else NORMAL
        model.pieces.add(piece=token, score=scores.get(token, -float(len(vocab))), type=kind)


def _has_prefix(parts: Mapping[str, Any]) -> bool:
    """Whether text gets an implicit leading space."""
    normalizer = parts.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])
    if parts.get("pre_tokenizer") is None and steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return _PREPEND in steps
    kind = (parts.get("pre_tokenizer") or normalizer)["type"]
    raise TokenizerError(f"tokenizer.json: {kind} is not quite SentencePiece's way; {_REMEDY}")


def _scores(merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """By piece, from the order in which they are merged."""
    order = [piece for piece, _ in itertools.groupby(a + b for a, b in merges)]
    scores = {piece: -float(i) for i, piece in enumerate(order)}
    known = {part for pair in merges for part in pair} | set(scores)
    if len(scores) != len(order) or set(merges_of(order, known)) != set(merges):
        raise TokenizerError(f"tokenizer.json: merges that follow from no scores; {_REMEDY}")
    return scores
