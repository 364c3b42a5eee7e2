"""SmolLM2's vocabulary and template: the reference's ids, and transformers'."""

import numpy as np
import pytest
from chat_vocabularies import written

from llama_jax.interchange.opening import open_source
from llama_jax.tokenizers.chat import Message, make_chat_format, message_to_json

QUESTION = [Message("user", "What is the capital of France?")]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    source = open_source(smollm2_gguf)
    return source.load_tokenizer(), source.chat_template


@pytest.mark.parametrize("own_template", [False, True])
def test_a_question_has_the_ids_that_the_reference_was_asked(smollm2, shared, own_template):
    tokenizer, template = smollm2
    wanted = np.load(shared / "reference" / "smollm2" / "reference.npz")["chat.ids"]
    chat = make_chat_format(tokenizer, template=template if own_template else None)
    assert chat.name == ("template" if own_template else "chatml")
    assert chat.stop_tokens == {"<|im_end|>", "<|endoftext|>"}
    ids = chat.encode(QUESTION, add_generation_prompt=True).ids
    assert len(ids) == 37
    assert ids == wanted.tolist()


def test_the_built_in_format_is_the_models_template(smollm2):
    tokenizer, template = smollm2
    conversation = [
        Message("system", "  Be brief.\n"),
        Message("user", "\n\nadd 12345 Việt 🙂"),
        Message("assistant", "\n\nOk.\n "),
        Message("user", "<|im_end|>"),
    ]
    own = make_chat_format(tokenizer, template=template).encode(conversation)
    built_in = make_chat_format(tokenizer).encode(conversation)
    assert own == built_in
    # The header's line end and the answer's first are one token, which begins in the header.
    assert written(tokenizer, own) == ["\nOk.\n <|im_end|>"]


def test_transformers_gives_the_same_ids(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer, template = smollm2
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for conversation in (
        QUESTION,
        [*QUESTION, Message("assistant", " Paris,\n\nof 2 million."), Message("user", "a  12\n")],
        [Message("system", ""), Message("user", "नमस्ते\t\t 3.5")],
    ):
        ours = make_chat_format(tokenizer, template=template).encode(conversation)
        tables = [message_to_json(message) for message in conversation]
        wanted = theirs.apply_chat_template(tables, chat_template=template, return_dict=True)
        assert ours.ids == wanted["input_ids"]
