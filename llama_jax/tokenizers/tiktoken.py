"""Byte-pair tokenizers stored in tiktoken's form: the real Llama 3 one and those trained here.

`tokenizer.model` has a line a token, base64 of its bytes and its rank; the rank is both the id and
the merge priority. Special tokens and the way with long text stand beside it in
`tokenizer_config.json`; without that file they are Llama 3's.
"""

import base64
import binascii
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.tokenizers.special import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    LLAMA3_SPECIAL_COUNT,
    pad_token,
    special_tokens,
)
from llama_jax.tokenizers.spelling import Spelling
from llama_jax.tokenizers.splitting import (
    LLAMA3_PATTERN,
    cut_like_reference,
    set_apart_white_space,
)
from llama_jax.tokenizers.streaming import decode_all
from llama_jax.tokenizers.tokenizer import TokenizerError, check_allowed, check_ids, require_id

if TYPE_CHECKING:
    import tiktoken

MODEL_FILE = "tokenizer.model"


class TiktokenTokenizer:
    """Byte-level BPE with the Llama 3 split pattern.

    Args:
      ranks: the bytes of each ordinary token, and its id and merge priority.
      special: special tokens by name, with ids after the ordinary ones.
      cut_long_text: cut as Llama 3's reference does (every 400,000 characters and in runs of
        25,000), which changes ids at the cuts. Otherwise the pattern alone decides.
    """

    def __init__(
        self, ranks: Mapping[bytes, int], special: Mapping[str, int], *, cut_long_text: bool
    ) -> None:
        self.ranks, self._special, self.cut_long_text = dict(ranks), dict(special), cut_long_text
        _check_vocabulary(self.ranks, self._special)

    @property
    def vocab_size(self) -> int:
        """Ordinary plus special tokens."""
        return len(self.ranks) + len(self._special)

    @property
    def special(self) -> Mapping[str, int]:
        """Special tokens by name."""
        return self._special

    @property
    def bos_id(self) -> int:
        """Begins every document."""
        return self._special[BEGIN_OF_TEXT]

    @property
    def eos_id(self) -> int:
        """Ends every document of a base model; a chat model also stops at `<|eot_id|>`."""
        return self._special[END_OF_TEXT]

    @property
    def pad_id(self) -> int:
        """Fills rows."""
        return require_id(pad_token(self._special), "padding")

    @property
    def adds_bos(self) -> bool:
        """Llama 3's prompts begin with the begin token, and so do our own documents."""
        return True

    @property
    def spelling(self) -> Spelling:
        """The bytes of each token."""
        return self._spelling

    @functools.cached_property
    def _spelling(self) -> Spelling:
        pieces = [b""] * self.vocab_size
        for token, rank in self.ranks.items():
            pieces[rank] = token
        return Spelling(pieces, {i: name for name, i in self._special.items()})

    @property
    def fingerprint(self) -> str:
        """Of the ranks, the special tokens, the pattern and the way with long text."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        rest = json.dumps([sorted(self._special.items()), LLAMA3_PATTERN, self.cut_long_text])
        return hashlib.sha256(_model_text(self.ranks) + rest.encode()).hexdigest()[:16]

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
        # Special tokens are looked for after cutting, as the reference does: one across a cut is
        # text.
        for piece, whole in self._pieces(text):
            encoding = self._whole if whole else self._encoding
            ids += encoding.encode(piece, allowed_special=allowed_special, disallowed_special=())
        return [*ids, self.eos_id] if eos else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; see `Tokenizer.decode`."""
        if skip_special:
            return decode_all(self, ids, skip_special=True)
        ids = list(ids)
        check_ids(ids, self.vocab_size)
        return self._encoding.decode(ids, errors="replace")

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`."""
        from llama_jax.tokenizers.hugging_face import save_hugging_face

        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(_model_text(self.ranks))
        save_hugging_face(self, folder)

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        if self.cut_long_text:
            return ((piece, False) for piece in cut_like_reference(text))
        return set_apart_white_space(text)

    @functools.cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        return _make_encoding(LLAMA3_PATTERN, self.ranks, self._special)

    @functools.cached_property
    def _whole(self) -> "tiktoken.Encoding":
        return _make_encoding(r"(?s:.+)", self.ranks, {})

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes get the vocabulary; each builds its own encoder.
        return _from_state, (self.ranks, self._special, self.cut_long_text)


def load_tiktoken(
    model: Path, special: Mapping[str, int] | None, *, cut_long_text: bool
) -> TiktokenTokenizer:
    """The tokenizer of a `tokenizer.model` file; without `special`, Llama 3.1's 256 follow.

    Raises:
      TokenizerError: absent or malformed file, with the line.
    """
    ranks = load_ranks(model)
    special = special or special_tokens(len(ranks), LLAMA3_SPECIAL_COUNT)
    return TiktokenTokenizer(ranks, special, cut_long_text=cut_long_text)


def load_ranks(model: Path) -> dict[bytes, int]:
    """Ranks by token bytes.

    Raises:
      TokenizerError: absent or malformed file, with the line.
    """
    ranks = {}
    try:
        lines = model.read_bytes().splitlines()
    except OSError as error:
        raise TokenizerError(f"{model}: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(f"{model}:{number}: not a base64 token and a rank") from None
    return ranks


def _model_text(ranks: Mapping[bytes, int]) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def _make_encoding(
    pattern: str, ranks: dict[bytes, int], special: dict[str, int]
) -> "tiktoken.Encoding":
    import tiktoken

    return tiktoken.Encoding(
        "llama_jax", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )


def _from_state(
    ranks: dict[bytes, int], special: dict[str, int], cut_long_text: bool
) -> TiktokenTokenizer:
    return TiktokenTokenizer(ranks, special, cut_long_text=cut_long_text)


def _check_vocabulary(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> None:
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        raise TokenizerError(f"the vocabulary lacks the byte {missing[0]}; not every text has ids")
    ids = sorted([*ranks.values(), *special.values()])
    if ids != list(range(len(ids))):
        raise TokenizerError(f"the {len(ids)} token ids are not 0 to {len(ids) - 1}, each once")
    for name in (BEGIN_OF_TEXT, END_OF_TEXT):
        if name not in special:
            raise TokenizerError(f"the vocabulary has no special token {name}")
