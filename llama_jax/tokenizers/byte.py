"""A tokenizer with one token a byte, for tests and for models without a vocabulary."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from llama_jax.tokenizers.special import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    RIGHT_PAD,
    SMALL_SPECIAL_COUNT,
    special_tokens,
)
from llama_jax.tokenizers.spelling import Spelling
from llama_jax.tokenizers.streaming import decode_all
from llama_jax.tokenizers.tokenizer import check_allowed, valid_unicode

BYTE_CLASS = "ByteTokenizer"


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 to 271 the special tokens."""

    def __init__(self) -> None:
        self._special = special_tokens(256, SMALL_SPECIAL_COUNT)

    @property
    def vocab_size(self) -> int:
        """Bytes plus special tokens."""
        return 256 + len(self._special)

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
        """Ends every document."""
        return self._special[END_OF_TEXT]

    @property
    def pad_id(self) -> int:
        """Fills rows."""
        return self._special[RIGHT_PAD]

    @property
    def adds_bos(self) -> bool:
        """Documents begin with the begin token, so prompts do."""
        return True

    @property
    def spelling(self) -> Spelling:
        """Each byte as itself."""
        return self._spelling

    @functools.cached_property
    def _spelling(self) -> Spelling:
        names = {i: name for name, i in self._special.items()}
        return Spelling([*(bytes([i]) for i in range(256)), *[b""] * len(names)], names)

    @property
    def fingerprint(self) -> str:
        """The same for every byte tokenizer with these special tokens."""
        return hashlib.sha256(json.dumps(["byte", self._special]).encode()).hexdigest()[:16]

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        allowed_special: AbstractSet[str] = frozenset(),
    ) -> list[int]:
        """The bytes of `text`; see `Tokenizer.encode`."""
        check_allowed(allowed_special, self._special)
        ids = [self.bos_id] if bos else []
        for part in _split_special(text, allowed_special):
            named = part in allowed_special
            ids += [self._special[part]] if named else valid_unicode(part).encode()
        return [*ids, self.eos_id] if eos else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; see `Tokenizer.decode`."""
        return decode_all(self, ids, skip_special=skip_special)

    def save(self, folder: Path) -> None:
        """Write `tokenizer_config.json`, all there is to tell."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"tokenizer_class": BYTE_CLASS}, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _split_special(text: str, allowed: AbstractSet[str]) -> list[str]:
    if not allowed:
        return [text]
    return re.split("(" + "|".join(map(re.escape, sorted(allowed))) + ")", text)
