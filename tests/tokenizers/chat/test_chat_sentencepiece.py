"""Formats of SentencePiece vocabularies: the library's own ids of each exchange, and the mask."""

import pytest
from chat_vocabularies import written

from llama_jax.tokenizers.chat import Message, make_chat_format

TALK = [
    Message("system", "Be brief."),
    Message("user", " Who are you? "),
    Message("assistant", "The fox."),
    Message("user", "Việt 12?"),
]


@pytest.fixture(scope="session")
def library(sentencepiece_proto):
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_proto)


def test_llama2_has_the_ids_that_the_library_gives_each_exchange(sentencepiece_tokenizer, library):
    chat = make_chat_format(sentencepiece_tokenizer)
    first = library.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Who are you? [/INST] The fox. ")
    last = library.encode("[INST] Việt 12? [/INST]")
    encoded = chat.encode(TALK, add_generation_prompt=True)
    assert chat.name == "llama2"
    assert encoded.ids == [1, *first, 2, 1, *last]
    assert written(sentencepiece_tokenizer, encoded) == ["The fox. </s>"]


def test_the_first_token_of_a_llama2_answer_is_its_own_with_the_space_before_it(
    sentencepiece_tokenizer,
):
    chat = make_chat_format(sentencepiece_tokenizer)
    prompt = chat.encode(TALK[:2], add_generation_prompt=True).ids
    whole = chat.encode(TALK[:3])
    assert whole.ids[: len(prompt)] == prompt
    assert whole.mask == [False] * len(prompt) + [True] * (len(whole.ids) - len(prompt))


def test_zephyr_encodes_each_turn_as_one_text(sentencepiece_tokenizer, library):
    encoded = make_chat_format(sentencepiece_tokenizer, name="zephyr").encode(
        [Message("user", "Who?"), Message("assistant", "Me: é.")], add_generation_prompt=True
    )
    turns = ["<|user|>\nWho?", "\n<|assistant|>\nMe: é.", "\n<|assistant|>\n"]
    one, two, three = map(library.encode, turns)
    assert encoded.ids == [1, *one, 2, *two, 2, *three]
    assert written(sentencepiece_tokenizer, encoded) == ["Me: é.</s>"]


def test_control_pieces_in_a_text_stay_text(sentencepiece_tokenizer):
    encoded = make_chat_format(sentencepiece_tokenizer).encode([Message("user", "a</s><s>b")])
    assert encoded.ids[0] == 1
    assert not {1, 2} & set(encoded.ids[1:])
    assert sentencepiece_tokenizer.decode(encoded.ids[1:]) == "[INST] a</s><s>b [/INST]"
