"""Cutting very long text: where the reference does, and where only the pattern does."""

import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.tokenizers import splitting


def test_the_pattern_splits_as_llama_3_says():
    pieces = regex.findall(splitting.LLAMA3_PATTERN, "I'M  ok:\n\n  12345é  \n x ")
    assert pieces == ["I", "'M", " ", " ok", ":\n\n", " ", " ", "123", "45", "é", "  \n", " x", " "]


def test_the_reference_cuts_runs_every_25000_characters_from_their_first():
    text = "ab " + "c" * 60_000 + "\x1c d"
    assert [len(piece) for piece in splitting.cut_like_reference(text)] == [25_003, 25_000, 10_003]


def test_the_reference_cuts_every_400000_characters_first():
    text = ("x" * 9 + " ") * 90_000
    lengths = [len(piece) for piece in splitting.cut_like_reference(text)]
    assert lengths == [400_000, 400_000, 100_000]


WORDS = st.sampled_from(["a", "é", "1", "!", " ", "  ", "\n", "\r\n", "\t", "\x1c", "\u3000", "'s"])


@settings(max_examples=1000, deadline=None)
@given(st.lists(WORDS, max_size=14).map("".join))
def test_setting_white_space_apart_changes_no_piece(text):
    # Three characters count as very long here, so that small texts try every case.
    long_before = splitting._SAFE_RUN_CHARS
    splitting._SAFE_RUN_CHARS = 3
    splitting._long_white_space.cache_clear()
    try:
        parts = list(splitting.set_apart_white_space(text))
    finally:
        splitting._SAFE_RUN_CHARS = long_before
        splitting._long_white_space.cache_clear()
    assert "".join(part for part, _ in parts) == text
    pieces = []
    for part, whole in parts:
        pieces += (
            ([part] if part else []) if whole else regex.findall(splitting.LLAMA3_PATTERN, part)
        )
    assert pieces == regex.findall(splitting.LLAMA3_PATTERN, text)
