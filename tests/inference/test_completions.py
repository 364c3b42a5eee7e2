"""Stop strings in pieces of text, and the shapes that requests are rounded to."""

import itertools

import pytest

from llama_jax.inference.buckets import (
    Shapes,
    batch_bucket,
    cache_bucket,
    chunk_lengths,
    plan_shapes,
)
from llama_jax.inference.completions import StopStrings


def feed(strings, pieces):
    stops, given = StopStrings(strings), []
    for piece in pieces:
        given.append(stops.push(piece))
        if stops.found is not None:
            return given, stops.found
    return [*given, stops.finish()], None


def test_text_that_could_begin_a_stop_string_is_held_until_it_is_not():
    assert feed(["<end>"], ["a<", "e", "x<", "en", "d", ">b"]) == (
        ["a", "", "<ex", "", "", ""],
        "<end>",
    )
    assert feed(["<end>"], ["a<en"]) == (["a", "<en"], None)
    assert feed(["aab"], ["aa", "ab"]) == (["", "a"], "aab")


def test_of_several_the_first_to_begin_ends_the_text_then_the_first_named():
    assert feed(["cd", "bcde"], ["abcdef"]) == (["a"], "bcde")
    assert feed(["bcd", "bc"], ["abcd"]) == (["a"], "bcd")
    assert feed(["bcd", "bc"], ["abc"]) == (["a"], "bc")


def test_however_a_text_is_cut_into_pieces_what_is_given_is_the_same():
    text = "ab\nab\n\nab"
    for cuts in itertools.combinations(range(1, len(text)), 3):
        pieces = [text[a:b] for a, b in itertools.pairwise((0, *cuts, len(text)))]
        given, found = feed(["\n\n"], pieces)
        assert ("".join(given), found) == ("ab\nab", "\n\n")


def test_without_stop_strings_text_passes_through():
    assert feed([], ["a", "", "b"]) == (["a", "", "b", ""], None)


@pytest.mark.parametrize(
    ("length", "rows", "chunks"),
    [
        (0, 1, (16,)),
        (16, 1, (16,)),
        (17, 1, (32,)),
        (2048, 1, (2048,)),
        (2049, 1, (2048, 16)),
        (5000, 4, (2048, 2048, 1024)),
        (600, 32, (256, 256, 128)),
        (100, 4096, (16,) * 6 + (16,)),
    ],
)
def test_prompts_go_in_powers_of_two_and_long_ones_in_bounded_chunks(length, rows, chunks):
    assert chunk_lengths(length, rows) == chunks


def test_caches_grow_by_buckets_of_which_a_third_at_most_is_spare():
    assert [cache_bucket(n) for n in (1, 128, 129, 192, 193, 257, 385, 32768)] == (
        [128, 128, 192, 192, 256, 384, 512, 32768]
    )
    assert all(n <= cache_bucket(n) <= 1.5 * n for n in range(128, 5000))


def test_batches_are_powers_of_two_on_each_shard():
    assert [batch_bucket(n, 1) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    assert [batch_bucket(n, 6) for n in (1, 6, 7, 13)] == [6, 6, 12, 24]


def test_the_cache_has_room_for_every_chunk_and_every_step():
    assert plan_shapes([5], 1, 12, 1) == Shapes(1, 1, (16,), 128)
    shapes = plan_shapes([3000, 7], 6, 100, 4)
    assert shapes == Shapes(4, 8, (2048, 1024), 4096)
    assert shapes.cache_len >= sum(shapes.chunks) + 100
