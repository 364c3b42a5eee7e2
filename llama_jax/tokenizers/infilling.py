"""Code Llama's prompts for filling a gap, and reading what fills it.

SentencePiece's implicit leading space would stand in the middle of the text: only the prefix, which
begins it, has one.
"""

from collections.abc import Iterable

from llama_jax.tokenizers.sentencepiece import (
    END_OF_INFILL,
    MIDDLE,
    PREFIX,
    SUFFIX,
    SentencePieceTokenizer,
)
from llama_jax.tokenizers.streaming import StreamDecoder
from llama_jax.tokenizers.tokenizer import TokenizerError


def encode_infilling(
    tokenizer: SentencePieceTokenizer, prefix: str, suffix: str, *, suffix_first: bool = False
) -> list[int]:
    """The prompt for what stands between `prefix` and `suffix`.

        PSM:  BOS PRE prefix SUF suffix MID
        SPM:  BOS PRE SUF suffix MID prefix      (suffix_first)

    A middle to train on is `encode_continuation` and the end-of-infill token.

    Raises:
      TokenizerError: not Code Llama's vocabulary.
    """
    pre, suf, mid = (infill_id(tokenizer, name) for name in (PREFIX, SUFFIX, MIDDLE))
    before, after = tokenizer.encode(prefix), tokenizer.encode_continuation(suffix)
    if suffix_first:
        return [tokenizer.bos_id, pre, suf, *after, mid, *before]
    return [tokenizer.bos_id, pre, *before, suf, *after, mid]


def decode_infilling(tokenizer: SentencePieceTokenizer, ids: Iterable[int]) -> str:
    """The text of a generated middle up to the end-of-infill token, its first space kept."""
    end = infill_id(tokenizer, END_OF_INFILL)
    # What follows a line feed is no beginning of a text.
    stream = StreamDecoder(tokenizer, tokenizer.encode_continuation("\n"))
    pieces = []
    for token_id in ids:
        if token_id == end:
            break
        pieces.append(stream.push(token_id))
    return "".join([*pieces, stream.finish()])


def infill_id(tokenizer: SentencePieceTokenizer, name: str) -> int:
    """The id of `PREFIX`, `SUFFIX`, `MIDDLE` or `END_OF_INFILL`.

    Raises:
      TokenizerError: not Code Llama's vocabulary.
    """
    if name not in tokenizer.special:
        raise TokenizerError(f"no {name} token: only Code Llama's vocabulary fills gaps")
    return tokenizer.special[name]
