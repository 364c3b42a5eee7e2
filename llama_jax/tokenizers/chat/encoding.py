"""From the pieces of a rendered conversation to ids and the assistant's mask.

Special tokens come only from the pieces that are marked as such: text is always ordinary text.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llama_jax.tokenizers.chat.message import Encoded
from llama_jax.tokenizers.tokenizer import Tokenizer, TokenizerError, valid_unicode


@dataclass(frozen=True)
class Piece:
    """A special token by name, or text.

    Texts that follow each other are encoded as one, unless `apart` starts anew: Llama 3's
    reference encodes the header's empty line and the content each alone.
    """

    text: str
    written: bool = False  # by the assistant
    special: bool = False
    apart: bool = False


def special_id(tokenizer: Tokenizer, name: str, chat_format: str) -> int:
    """The id of a special token that a format needs.

    Raises:
      TokenizerError: the vocabulary lacks it.
    """
    if name not in tokenizer.special:
        raise TokenizerError(f"the {chat_format} chat format needs the special token {name}, which"
                             " this vocabulary lacks")  # fmt: skip
    return tokenizer.special[name]


def special_name(tokenizer: Tokenizer, token_id: int) -> str:
    """The name of a special token's id.

    Raises:
      TokenizerError: it isn't one.
    """
    for name, special in tokenizer.special.items():
        if special == token_id:
            return name
    raise TokenizerError(f"token {token_id} is not a special token of this vocabulary")


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Encoded:
    """Ids and mask. A token across the border of two pieces belongs to the one it begins in.

    pieces   <|im_start|>  "assistant\\n"  "Hi."   <|im_end|>  "\\n"
    ids      1             520 198         25 30   2           198
    mask     -             -   -           x  x    x           -
    """
    ids: list[int] = []
    mask: list[bool] = []
    for group in _groups(pieces):
        if group[0].special:
            found, written = [tokenizer.special[group[0].text]], [group[0].written]
        else:
            found, written = _encode_texts(tokenizer, group)
        ids += found
        mask += written
    return Encoded(ids, mask)


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Each special token alone, and the runs of texts that are encoded as one."""
    group: list[Piece] = []
    for piece in pieces:
        if group and (piece.special or piece.apart or group[0].special):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _encode_texts(tokenizer: Tokenizer, texts: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    parts = [valid_unicode(piece.text) for piece in texts]
    ids = tokenizer.encode("".join(parts))
    if len({piece.written for piece in texts}) == 1:
        return ids, [texts[0].written] * len(ids)
    ends = list(itertools.accumulate(len(part.encode()) for part in parts))
    starts = _token_starts(tokenizer, ids, ends[-1])
    # An empty piece has no tokens: bisect_right steps over it.
    places = (min(bisect.bisect_right(ends, start), len(texts) - 1) for start in starts)
    return ids, [texts[place].written for place in places]


def _token_starts(tokenizer: Tokenizer, ids: Sequence[int], size: int) -> list[int]:
    """The byte of the text at which each token begins."""
    lengths = [len(tokenizer.spelling.pieces[i]) for i in ids]
    # SentencePiece puts a space before the text; it belongs to the first token.
    added = max(sum(lengths) - size, 0)
    starts = [0, *itertools.accumulate(lengths)][:-1]
    return [max(start - added, 0) for start in starts]
