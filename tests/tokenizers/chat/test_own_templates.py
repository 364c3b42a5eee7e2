"""Our formats as jinja write what the formats themselves do, here and in transformers."""

import pytest
from chat_vocabularies import BytesWith

from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.chat import FORMATS, ChatError, Message, ToolCall, make_chat_format
from llama_jax.tokenizers.chat.message import message_to_json
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
TOOLS = [
    {"type": "function", "function": {"name": "now"}},
    {
        "name": "weather",
        "description": 'The "weather", now.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Which; é"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "description": "C\nor F"},
            },
            "required": ["unit", "city"],
        },
    },
]
CALL = ToolCall("weather", {"city": 'Café "Zoë" <|eot_id|>', "days": [1, None], "unit": {"a": 0.5}})
CALLS = [
    [USER, Message("assistant", " Well: ", (CALL, ToolCall("now", {})))],
    [SYSTEM, USER, Message("assistant", "", (CALL,)), Message("tool", ' {"t": 3}\n'), REPLY],
]
BUILT_IN = [
    [USER, Message("assistant", "", (ToolCall("code_interpreter", {"code": " print('<')\n"}),))],
    [USER, Message("assistant", "", (ToolCall("brave_search", {"query": 'a "b" é'}),))],
]
WRITING_CALLS = ("llama3", "llama3.1", "chatml")
DESCRIBING = ("llama3", "llama3.1")


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


@pytest.mark.parametrize("name", WRITING_CALLS)
@pytest.mark.parametrize("talk", CALLS)
def test_calls_of_tools_and_their_answers_too(name, talk):
    ours, template = both(name)
    assert template.encode(talk) == ours.encode(talk)


@pytest.mark.parametrize("name", DESCRIBING)
@pytest.mark.parametrize("talk", [*TALKS, *CALLS, *BUILT_IN])
@pytest.mark.parametrize("tools", [TOOLS, TOOLS[:1]])
def test_llama_3s_tell_of_tools_as_the_formats_do(name, talk, tools):
    ours, template = both(name)
    found = template.encode(talk, tools=tools)
    assert found == ours.encode(talk, tools=tools)
    assert len(found.ids) > len(ours.encode(talk).ids) + 300


@pytest.mark.parametrize("name", VOCABULARIES)
def test_what_the_templates_can_not_write_is_refused(name):
    _, template = both(name)
    if name not in DESCRIBING:
        with pytest.raises(ChatError, match="can't describe tools"):
            template.encode([USER], tools=TOOLS)
    if name not in WRITING_CALLS:
        with pytest.raises(ChatError, match="has no tool messages"):
            template.encode([USER, Message("tool", "3")])
        with pytest.raises(ChatError, match="has no calls of tools"):
            template.encode([USER, Message("assistant", "", (ToolCall("add", {}),))])


def test_every_format_has_one_but_those_that_are_said():
    without = [n for n in FORMATS if own_template(n, VOCABULARIES.get(n, SENTENCE)) is None]
    assert without == ["codellama-70b", "template"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_transformers_renders_the_same_text(name):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokenizer, (ours, _) = VOCABULARIES[name], both(name)
    names = {i: token for token, i in tokenizer.special.items()}
    calls = CALLS if name in WRITING_CALLS else []
    tools = TOOLS if name in DESCRIBING else []
    for talk in [*TALKS, *calls, *(BUILT_IN if tools else [])]:
        asks = talk[-1].role == "user"
        (text,), _ = utils.render_jinja_template(
            [[message_to_json(m) for m in talk]],
            tools=tools or None,
            chat_template=own_template(name, tokenizer),
            add_generation_prompt=asks,
            bos_token=names[tokenizer.bos_id],
            eos_token=names[tokenizer.eos_id],
        )
        ids = ours.encode(talk, tools=tools, add_generation_prompt=asks).ids
        assert text == tokenizer.decode(ids)


def test_arguments_may_be_json_in_a_text_as_openai_has_them():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    call = {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    (text,), _ = utils.render_jinja_template(
        [[{"role": "assistant", "content": None, "tool_calls": [call]}]],
        chat_template=own_template("llama3", ByteTokenizer()),
        bos_token="",
    )
    assert '{"type": "function", "name": "weather", "parameters": {"city": "Oslo"}}<|eot' in text
