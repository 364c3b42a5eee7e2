"""Streaming: characters come out whole, once, and as soon as they can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.tokenizers import StreamDecoder, TokenizerError
from llama_jax.tokenizers.byte import ByteTokenizer

BYTES = ByteTokenizer()


def pieces_of(tokenizer, ids, prompt_ids=(), **options):
    stream = StreamDecoder(tokenizer, prompt_ids, **options)
    return [*map(stream.push, ids), stream.finish()]


@pytest.mark.short
def test_a_character_of_several_tokens_comes_out_with_its_last_byte():
    assert pieces_of(BYTES, "a🙂é".encode()) == ["a", "", "", "", "🙂", "", "é", ""]


def test_an_unfinished_character_is_told_once_at_the_end():
    stream = StreamDecoder(BYTES)
    assert [stream.push(i) for i in "🙂".encode()[:3]] == ["", "", ""]
    assert (stream.finish(), stream.finish()) == ("\ufffd", "")


def test_broken_bytes_come_out_as_soon_as_they_are_known_to_be_broken():
    assert pieces_of(BYTES, [0xFF, 0xF0, 0x9F, 97]) == ["\ufffd", "", "", "\ufffda", ""]


def test_a_special_token_ends_an_unfinished_character():
    ids = [0xC3, 265, 0xA9]
    assert pieces_of(BYTES, ids) == ["", "\ufffd<|eot_id|>", "\ufffd", ""]
    assert pieces_of(BYTES, ids, skip_special=True) == ["", "\ufffd", "\ufffd", ""]
    assert BYTES.decode([97, 265, 98], skip_special=True) == "ab"


def test_a_character_that_begins_in_the_prompt_is_finished_after_it():
    emoji = list("🙂".encode())
    assert pieces_of(BYTES, emoji[2:], prompt_ids=[97, *emoji[:2]]) == ["", "🙂", ""]


def test_an_id_outside_the_vocabulary_is_an_error():
    for wrong in (-1, 272):
        with pytest.raises(TokenizerError, match=f"token id {wrong} is outside"):
            StreamDecoder(BYTES).push(wrong)


@given(st.lists(st.integers(0, 255)))
def test_joined_pieces_are_what_python_decodes(ids):
    expected = bytes(ids).decode("utf-8", "replace")
    assert "".join(pieces_of(BYTES, ids)) == expected
    assert BYTES.decode(ids) == expected


@pytest.mark.parametrize(
    ("ids", "pieces"),
    [
        ([76460, 232], ["", "😊", ""]),
        ([111690, 28740, 117, 108281], ["삼", "", "겹", "살", ""]),
    ],
)
def test_llama_3_streams_characters_that_span_tokens(llama3, ids, pieces):
    assert pieces_of(llama3, ids) == pieces
    assert llama3.decode(ids) == "".join(pieces)


@given(ids=st.lists(st.integers(0, 128255), max_size=40))
def test_llama_3_pieces_join_to_the_decoded_text(llama3, ids):
    assert "".join(pieces_of(llama3, ids)) == llama3.decode(ids)
