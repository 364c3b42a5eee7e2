"""How the ids of a vocabulary are written as text; `streaming` does the writing."""

import dataclasses
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

Leading = Literal["kept", "first", "all"]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How the ids of a vocabulary are written.

    Attributes:
      pieces: UTF-8 bytes of each id inside a text; those of special ids aren't looked at.
      special: names of the special tokens, by id.
      leading: spaces dropped at the start of a text: none, that of the first ordinary token, or
        those of all first tokens until one leaves any text. Special tokens don't count as text.
      bytes_as_such: ids of single bytes, whose space is none that is dropped.
      broken: U+FFFD for each byte of broken UTF-8, as `sentencepiece` does, or for each longest
        beginning of a character, as Unicode recommends and Python and tiktoken do.
    """

    pieces: Sequence[bytes]
    special: Mapping[int, str]
    leading: Leading = "kept"
    bytes_as_such: AbstractSet[int] = frozenset()
    broken: Literal["each_byte", "each_character"] = "each_character"
