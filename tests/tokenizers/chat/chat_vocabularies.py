"""A byte vocabulary with any special tokens: chat formats need no more."""

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path

from llama_jax.tokenizers.spelling import Spelling
from llama_jax.tokenizers.streaming import decode_all
from llama_jax.tokenizers.tokenizer import check_allowed, valid_unicode


class BytesWith:
    """Ids 0 to 255 are bytes, then the special tokens; the first is BOS, the second EOS."""

    def __init__(self, *special: str, adds_bos: bool = False) -> None:
        self.special = {name: 256 + i for i, name in enumerate(special)}
        self.adds_bos = adds_bos
        self.vocab_size = 256 + len(special)
        self.bos_id, self.eos_id, self.pad_id = 256, 257, 257
        self.fingerprint = "-".join(special)

    @property
    def spelling(self) -> Spelling:
        names = {i: name for name, i in self.special.items()}
        return Spelling([*(bytes([i]) for i in range(256)), *[b""] * len(names)], names)

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        allowed_special: AbstractSet[str] = frozenset(),
    ) -> list[int]:
        check_allowed(allowed_special, self.special)
        assert not allowed_special, "chat formats pass text as text"
        ids = list(valid_unicode(text).encode())
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        return decode_all(self, ids, skip_special=skip_special)

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def written(tokenizer, encoded) -> list[str]:
    """The stretches of text that the assistant wrote, special tokens spelled out."""
    stretches, current = [], []
    for token_id, mask in zip(encoded.ids, encoded.mask, strict=True):
        if mask:
            current.append(token_id)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return [*stretches, tokenizer.decode(current)] if current else stretches
