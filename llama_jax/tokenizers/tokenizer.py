"""What every tokenizer offers, and what all of them share: errors, id checks, valid Unicode."""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from llama_jax.tokenizers.spelling import Spelling


class TokenizerError(ValueError):
    """A tokenizer file, text or id that can't be used; `str(error)` is one line."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    Text that spells a special token is ordinary text unless its name is in `allowed_special`:
    user content can't forge a turn. `fingerprint` differs when any text could get other ids.
    """

    @property
    def vocab_size(self) -> int:
        """Ordinary plus special tokens; ids are 0 to `vocab_size - 1`."""
        ...

    @property
    def special(self) -> Mapping[str, int]:
        """Special tokens by name, such as `<|end_of_text|>`."""
        ...

    @property
    def bos_id(self) -> int:
        """Begins every document.

        Raises:
          TokenizerError: the vocabulary names no such token; so for `eos_id` and `pad_id`.
        """
        ...

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills rows; never a token that ends text."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether this vocabulary's models expect plain prompts to begin with `bos_id`."""
        ...

    @property
    def spelling(self) -> Spelling:
        """How ids are written; `StreamDecoder` works from it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of everything that decides the ids."""
        ...

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        allowed_special: AbstractSet[str] = frozenset(),
    ) -> list[int]:
        """The ids of `text`; lone surrogates become U+FFFD.

        Raises:
          TokenizerError: a name in `allowed_special` is not a special token.
        """
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, special tokens spelled out or skipped; broken UTF-8 becomes U+FFFD.

        Raises:
          TokenizerError: an id outside the vocabulary.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write into `folder` what `load_tokenizer(folder)` and other projects read."""
        ...


def valid_unicode(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_allowed(allowed: AbstractSet[str], special: Mapping[str, int]) -> None:
    """Raise `TokenizerError` for a name that is no special token; a typo would pass as text."""
    unknown = sorted(set(allowed) - set(special))
    if unknown:
        raise TokenizerError(f"'{unknown[0]}' is not a special token of this tokenizer")


def id_or_none(tokenizer: Tokenizer, role: Literal["bos", "eos", "pad"]) -> int | None:
    """The id that begins, ends or pads, or None where the vocabulary names none."""
    try:
        return getattr(tokenizer, f"{role}_id")
    except TokenizerError:
        return None


def require_id(token_id: int | None, what: str) -> int:
    """`token_id`, or `TokenizerError` where the vocabulary has no such token, e.g. `padding`."""
    if token_id is None:
        raise TokenizerError(f"this tokenizer has no {what} token")
    return token_id


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise `TokenizerError` for the first id outside the vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise TokenizerError(f"token id {wrong} is outside the vocabulary of {vocab_size}")
