"""Merges written out for vocabularies that have none: tiktoken's and SentencePiece's.

There the best pair is the one whose joined token is best, and of equal pairs the leftmost. In a
list of merges each pair has its own place, so the order of the pairs of one token has to be chosen.
"""

from collections.abc import Container, Iterable


def merges_of(tokens: Iterable[str], known: Container[str]) -> list[tuple[str, str]]:
    """Every pair of `known` tokens that makes one of `tokens`, which come best first."""
    merges = []
    for token in tokens:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += _leftmost_first([(a, b) for a, b in cuts if a in known and b in known])
    return merges


def _leftmost_first(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Two pairs of a token overlap where the right part of one is the left part of the other.

    That one stands further left in the text, so it goes first:  `ab a` before `a ba`  in  ab a ba.
    Only repeated units (`a aa`, `aa a`) can stand both ways; they keep their order.
    """
    lefts = {left for left, _ in pairs}
    if not any(right in lefts for _, right in pairs):
        return pairs
    ordered = []
    while len(pairs) > 1:
        first = next((p for p in pairs if not _has_left_neighbour(p, pairs)), pairs[0])
        ordered.append(first)
        pairs = [pair for pair in pairs if pair != first]
    return ordered + pairs


def _has_left_neighbour(pair: tuple[str, str], pairs: list[tuple[str, str]]) -> bool:
    return any(right == pair[0] for left, right in pairs if (left, right) != pair)
