"""One token a byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.tokenizers import Tokenizer, TokenizerError, load_tokenizer
from llama_jax.tokenizers.byte import ByteTokenizer

TOKENIZER = ByteTokenizer()


def test_ids_are_the_bytes_of_utf_8():
    assert TOKENIZER.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert TOKENIZER.encode("a", bos=True, eos=True) == [256, 97, 257]
    assert (TOKENIZER.vocab_size, TOKENIZER.pad_id) == (272, 260)


def test_special_text_is_text_unless_allowed():
    text = "<|eot_id|>a"
    assert TOKENIZER.encode(text) == list(text.encode())
    assert TOKENIZER.encode(text, allowed_special={"<|eot_id|>"}) == [265, 97]
    with pytest.raises(TokenizerError, match=r"'<\|eot\|>' is not a special token"):
        TOKENIZER.encode(text, allowed_special={"<|eot|>"})


def test_decoding_spells_special_tokens_and_replaces_broken_utf_8():
    assert TOKENIZER.decode([256, 97, 0xC3, 265]) == "<|begin_of_text|>a\ufffd<|eot_id|>"
    with pytest.raises(TokenizerError, match="272"):
        TOKENIZER.decode([272])


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_gives_back_the_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_lone_surrogate_becomes_a_replacement_character():
    assert TOKENIZER.encode("a\ud83db") == [97, 0xEF, 0xBF, 0xBD, 98]


def test_saved_by_folder_and_known_by_name(tmp_path):
    TOKENIZER.save(tmp_path)
    for loaded in (load_tokenizer(tmp_path), load_tokenizer("byte")):
        assert loaded.fingerprint == TOKENIZER.fingerprint
        assert isinstance(loaded, Tokenizer)
