"""Shapes that requests are rounded up to, so that few programs serve all lengths.

Nothing here changes a result: what rounding adds are holes and rows that nothing sees.
"""

import dataclasses
from collections.abc import Sequence

SHORTEST_CHUNK, LONGEST_CHUNK = 16, 2048
SHORTEST_CACHE = 128
# Tokens of all rows that one prefill call takes, a bound on the memory of its activations.
TOKENS_A_CHUNK = 8192


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What one batch runs as.

    Attributes:
      prompts: rows of the prefill.
      rows: rows of decoding, those of each prompt's samples.
      chunks: tokens that each prefill call takes of every row.
      cache_len: places of the cache.
    """

    prompts: int
    rows: int
    chunks: tuple[int, ...]
    cache_len: int


def plan_shapes(prompt_lens: Sequence[int], rows: int, new_tokens: int, ways: int) -> Shapes:
    """The shapes for prompts of these lengths.

    Args:
      prompt_lens: of each prompt; the last token of each is decoding's first input.
      rows: how many rows decoding has.
      new_tokens: how many steps decoding takes.
      ways: over how many shards the batch is split.
    """
    prompts = batch_bucket(len(prompt_lens), ways)
    chunks = chunk_lengths(max(prompt_lens) - 1, prompts)
    cache_len = cache_bucket(sum(chunks) + new_tokens)
    return Shapes(prompts, batch_bucket(rows, ways), chunks, cache_len)


def batch_bucket(rows: int, ways: int) -> int:
    """A power of two times the shards: 1, 2, 4, ... rows on each."""
    return ways * _power_of_two(-(-rows // ways))


def chunk_lengths(length: int, rows: int) -> tuple[int, ...]:
    """How many tokens each prefill call takes: longest chunks, then the bucket of the rest."""
    longest = _power_of_two(max(SHORTEST_CHUNK, TOKENS_A_CHUNK // rows))
    longest = min(LONGEST_CHUNK, longest)
    whole, rest = divmod(length, longest)
    last = (max(SHORTEST_CHUNK, _power_of_two(rest)),) if rest or not whole else ()
    return (longest,) * whole + last


def cache_bucket(length: int) -> int:
    """128, 192, 256, 384, 512, 768, ...: half of what is read may be missing, a third at most not.

    A cache is read whole up to a length, so that a bucket much too large would cost time.
    """
    size = max(SHORTEST_CACHE, _power_of_two(length))
    smaller = size // 4 * 3
    return smaller if length <= smaller and smaller > SHORTEST_CACHE else size


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
