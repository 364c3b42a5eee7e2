"""SentencePiece vocabularies: Llama 1 and 2, Code Llama, TinyLlama and those trained here.

`tokenizer.model` is SentencePiece's own file. It gives every text its ids; special tokens are
looked for here, before it, and only where they are allowed.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama_jax.tokenizers import sentencepiece_proto
from llama_jax.tokenizers.sentencepiece_proto import BYTE, CONTROL, SPACE, UNKNOWN
from llama_jax.tokenizers.spelling import Leading, Spelling
from llama_jax.tokenizers.streaming import decode_all
from llama_jax.tokenizers.tokenizer import (
    TokenizerError,
    check_allowed,
    require_id,
    valid_unicode,
)

if TYPE_CHECKING:
    import sentencepiece

MODEL_FILE = "tokenizer.model"

# Code Llama's tokens for filling a gap: before it, after it, what fills it, its end.
PREFIX, SUFFIX, MIDDLE, END_OF_INFILL = (
    f"{SPACE}<{name}>" for name in ("PRE", "SUF", "MID", "EOT")
)
Role = Literal["bos", "eos", "pad"]


class SentencePieceTokenizer:
    """SentencePiece BPE with special tokens that text can't spell by itself.

    Between special tokens that are allowed, every stretch of text gets the implicit leading space,
    as in Meta's own chats, where each turn is encoded alone, and in llama.cpp.

    Args:
      proto: a SentencePiece model, the content of `tokenizer.model`.
      added: further special tokens by name: pieces of the model, or with ids after its own.
      roles: names of the begin, end and padding tokens where they are not those of the model.
      adds_bos: see `Tokenizer.adds_bos`.

    Raises:
      TokenizerError: not a BPE model, or added tokens that don't fit it.
    """

    def __init__(
        self,
        proto: bytes,
        added: Mapping[str, int] | None = None,
        *,
        roles: Mapping[Role, str] | None = None,
        adds_bos: bool = True,
    ) -> None:
        self.proto, self.model = proto, sentencepiece_proto.parse_model(proto)
        if self.model.trainer_spec.model_type != sentencepiece_proto.BPE:
            raise TokenizerError("the SentencePiece model is not BPE, as those of Llamas are")
        self._added, self._roles, self._adds_bos = dict(added or {}), dict(roles or {}), adds_bos
        _check_added(self._added, self.model)
        self._special = _special_pieces(self.model) | self._added
        for role, name in self._roles.items():
            if name not in self._special:
                raise TokenizerError(f"the {role} token '{name}' is not a special token")

    @property
    def vocab_size(self) -> int:
        """Pieces plus added tokens."""
        return max(len(self.model.pieces), 1 + max(self._special.values(), default=0))

    @property
    def special(self) -> Mapping[str, int]:
        """Control pieces, the unknown piece, infilling tokens and added tokens, by name."""
        return self._special

    @property
    def bos_id(self) -> int:
        """Begins every document."""
        return require_id(self._role("bos"), "begin (bos)")

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        return require_id(self._role("eos"), "end (eos)")

    @property
    def pad_id(self) -> int:
        """Fills rows; Llama 2 has none, and `<unk>`, unused with byte fallback, does it."""
        pad_id, unk_id = self._role("pad"), self.model.trainer_spec.unk_id
        if pad_id is None or pad_id == self._role("eos"):
            pad_id = unk_id if self.model.trainer_spec.byte_fallback else None
        return require_id(pad_id, "padding (pad)")

    @property
    def adds_bos(self) -> bool:
        """Llama's prompts begin with `<s>`."""
        return self._adds_bos

    @property
    def fingerprint(self) -> str:
        """Of the model file, the added tokens and the roles."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        # As they work out, so that a saved copy has the same however it names them.
        rest = json.dumps([sorted(self._special.items()), self._role("bos"), self._role("eos")])
        return hashlib.sha256(self.proto + rest.encode()).hexdigest()[:16]

    @property
    def spelling(self) -> Spelling:
        """Pieces with spaces for U+2581; the first one loses the implicit space."""
        return self._spelling

    @functools.cached_property
    def _spelling(self) -> Spelling:
        normalizer = self.model.normalizer_spec
        leading: Leading = "first" if normalizer.add_dummy_prefix else "kept"
        if normalizer.remove_extra_whitespaces:
            leading = "all"
        pieces = [*map(_bytes_of, self.model.pieces)]
        pieces += [b""] * (self.vocab_size - len(pieces))
        names = {i: name for name, i in self._special.items()}
        single = {i for i, piece in enumerate(self.model.pieces) if piece.type == BYTE}
        return Spelling(pieces, names, leading, single, "each_byte")

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        allowed_special: AbstractSet[str] = frozenset(),
    ) -> list[int]:
        """The ids of `text`; see `Tokenizer.encode`."""
        check_allowed(allowed_special, self._special)
        ids = [self.bos_id] if bos else []
        for part in _split_special(valid_unicode(text), frozenset(allowed_special)):
            named = part in allowed_special
            ids += [self._special[part]] if named else self._processor.encode(part)
        return [*ids, self.eos_id] if eos else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; see `Tokenizer.decode`.

        The first space of the text is SentencePiece's own and dropped, special tokens not counted.
        """
        return decode_all(self, ids, skip_special=skip_special)

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of `text` without the implicit leading space; no special tokens."""
        return self._without_prefix.encode(valid_unicode(text))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`."""
        from llama_jax.tokenizers.sentencepiece_json import save_hugging_face

        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.proto)
        save_hugging_face(self, folder)

    def _role(self, role: Role) -> int | None:
        if role in self._roles:
            return self._special[self._roles[role]]
        token_id = getattr(self.model.trainer_spec, f"{role}_id")
        return token_id if 0 <= token_id < len(self.model.pieces) else None

    @property
    def encoding_proto(self) -> bytes:
        """The model with every special token as a control piece, which no text matches."""
        return self._encoding_proto({})

    def _encoding_proto(self, normalizer: Mapping[str, bool]) -> bytes:
        model = sentencepiece_proto.parse_model(self.proto)
        for token_id in self._special.values():
            if token_id < len(model.pieces) and model.pieces[token_id].type != UNKNOWN:
                model.pieces[token_id].type = CONTROL
        for field, value in normalizer.items():
            setattr(model.normalizer_spec, field, value)
        return model.SerializeToString(deterministic=True)

    @functools.cached_property
    def _processor(self) -> "sentencepiece.SentencePieceProcessor":
        return _make_processor(self.encoding_proto)

    @functools.cached_property
    def _without_prefix(self) -> "sentencepiece.SentencePieceProcessor":
        return _make_processor(self._encoding_proto({"add_dummy_prefix": False}))

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes get the model; each builds its own processor.
        return _from_state, (self.proto, self._added, self._roles, self._adds_bos)


def _from_state(
    proto: bytes, added: Mapping[str, int], roles: Mapping[Role, str], adds_bos: bool
) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(proto, added, roles=roles, adds_bos=adds_bos)


def _make_processor(proto: bytes) -> "sentencepiece.SentencePieceProcessor":
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def _special_pieces(model: Any) -> dict[str, int]:
    infill = {PREFIX, SUFFIX, MIDDLE, END_OF_INFILL}
    return {
        piece.piece: i
        for i, piece in enumerate(model.pieces)
        if piece.type in (CONTROL, UNKNOWN) or piece.piece in infill
    }


def _check_added(added: Mapping[str, int], model: Any) -> None:
    count = len(model.pieces)
    beyond = sorted(token_id for token_id in added.values() if token_id >= count)
    if beyond != list(range(count, count + len(beyond))):
        raise TokenizerError(f"added ids {beyond[:5]} don't follow the {count} pieces")
    for name, token_id in added.items():
        if token_id < count and model.pieces[token_id].piece != name:
            piece = model.pieces[token_id].piece
            raise TokenizerError(f"added token '{name}' has the id {token_id} of piece '{piece}'")


def _bytes_of(piece: Any) -> bytes:
    if piece.type == BYTE:
        return bytes([int(piece.piece[3:5], 16)])
    return piece.piece.replace(SPACE, " ").encode()


@functools.lru_cache(maxsize=64)
def _splitter(allowed: frozenset[str]) -> re.Pattern[str]:
    # The longest name first: one may begin another.
    names = sorted(allowed, key=lambda name: (-len(name), name))
    return re.compile("(" + "|".join(map(re.escape, names)) + ")")


def _split_special(text: str, allowed: frozenset[str]) -> list[str]:
    return [part for part in _splitter(allowed).split(text) if part] if allowed else [text]
