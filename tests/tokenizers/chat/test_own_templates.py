"""Our formats as jinja write what the formats themselves do, here and in transformers."""

import pytest
from chat_vocabularies import BytesWith

from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.chat import FORMATS, ChatError, Message, ToolCall, make_chat_format
from llama_jax.tokenizers.chat.own_templates import own_template

SENTENCE = BytesWith("<s>", "</s>", "<unk>", adds_bos=True)
VOCABULARIES = {
    "llama2": SENTENCE,
    "llama3": ByteTokenizer(),
    "llama3.1": ByteTokenizer(),
    "chatml": BytesWith("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "zephyr": SENTENCE,
}
SYSTEM, USER, REPLY = (
    Message("system", " Be brief.\n"),
    Message("user", "\n Who {{ bos_token }}?  "),
    Message("assistant", " Me,\n\nI said. "),
)
TALKS = [[USER], [SYSTEM, USER], [USER, REPLY], [SYSTEM, USER, REPLY, Message("user", "Why?")]]


def both(name):
    tokenizer = VOCABULARIES[name]
    template = own_template(name, tokenizer)
    return make_chat_format(tokenizer, name=name), make_chat_format(tokenizer, template=template)


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("talk", TALKS)
def test_ids_and_masks_are_those_of_the_format(name, talk):
    ours, template = both(name)
    asks = talk[-1].role == "user"
    found = template.encode(talk, add_generation_prompt=asks)
    assert found == ours.encode(talk, add_generation_prompt=asks)
    assert template.stop_tokens <= ours.stop_tokens | {"<|endoftext|>"}
    assert set(VOCABULARIES[name].special) >= template.stop_tokens


@pytest.mark.parametrize("name", VOCABULARIES)
def test_what_the_templates_can_not_write_is_refused(name):
    _, template = both(name)
    with pytest.raises(ChatError, match="can't describe tools"):
        template.encode([USER], tools=[{"type": "function", "function": {"name": "add"}}])
    for message in (Message("tool", "3"), Message("assistant", "", (ToolCall("add", {}),))):
        if (name, message.role) != ("chatml", "tool"):
            with pytest.raises(ChatError, match=f"has no {message.role} messages, or no calls"):
                template.encode([USER, message])


def test_every_format_has_one_but_those_that_are_said():
    without = [n for n in FORMATS if own_template(n, VOCABULARIES.get(n, SENTENCE)) is None]
    assert without == ["codellama-70b", "template"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_transformers_renders_the_same_text(name):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokenizer, (ours, _) = VOCABULARIES[name], both(name)
    names = {i: token for token, i in tokenizer.special.items()}
    for talk in TALKS:
        asks = talk[-1].role == "user"
        (text,), _ = utils.render_jinja_template(
            [[{"role": m.role, "content": m.content} for m in talk]],
            chat_template=own_template(name, tokenizer),
            add_generation_prompt=asks,
            bos_token=names[tokenizer.bos_id],
            eos_token=names[tokenizer.eos_id],
        )
        assert text == tokenizer.decode(ours.encode(talk, add_generation_prompt=asks).ids)
