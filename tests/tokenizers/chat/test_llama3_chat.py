"""Llama 3's formats: every case of the reference, B01, masks, tools."""

import datetime

import pytest
from chat_vocabularies import BytesWith, written

from llama_jax.tokenizers import TokenizerError
from llama_jax.tokenizers.chat import (
    ChatError,
    Llama3Style,
    Message,
    Parameter,
    Tool,
    ToolCall,
    make_chat_format,
    messages_from_json,
)
from llama_jax.tokenizers.chat.tools import system_header, tool_instructions, tool_response

WHO = [Message("system", "You are a helpful assistant."), Message("user", "Who are you?")]
# Figures of known fault B01.
WHO_IDS = [128000, 128006, 9125, 128007, 271, 2675, 527, 264, 11190, 18328, 13, 128009, 128006, 882,
           128007, 271, 15546, 527, 499, 30, 128009, 128006, 78191, 128007, 271]  # fmt: skip
HEADER_IDS = [128006, 9125, 128007, 271, 38766, 1303, 33025, 2696, 25, 6790, 220, 2366, 18, 198,
              15724, 2696, 25, 220, 1627, 10263, 220, 2366, 19, 271, 128009]  # fmt: skip


def exact(case, python_tag):
    style = Llama3Style(case["tool_prompt_format"], python_tag=python_tag, trim=False)
    return style


@pytest.mark.parametrize(("python_tag", "key"), [("code_only", "ids"), ("always", "ids_0_0_63")])
def test_every_dialog_of_the_reference_has_its_ids(llama3, chat_reference, python_tag, key):
    assert len(chat_reference["dialogs"]) == 15
    for case in chat_reference["dialogs"]:
        chat = make_chat_format(llama3, name="llama3", llama3=exact(case, python_tag))
        messages = messages_from_json(case["messages"])
        encoded = chat.encode(messages, add_generation_prompt=True)
        assert encoded.ids == case.get(key, case["ids"]), case["name"]


def test_a_prompt_has_one_bos_and_exactly_these_ids(llama3):
    chat = make_chat_format(llama3, name="llama3")
    assert chat.encode(WHO, add_generation_prompt=True).ids == WHO_IDS


def test_without_a_system_message_the_dates_alone_stand_in_its_place(llama3):
    ids = make_chat_format(llama3).encode([Message("user", "Hi")]).ids
    assert ids[:1] == [128000]
    assert ids[1 : 1 + len(HEADER_IDS)] == HEADER_IDS


def test_the_date_is_a_parameter_and_told_in_the_same_way_everywhere(llama3):
    chat = make_chat_format(llama3, name="llama3.1", date=datetime.date(2031, 1, 5))
    text = llama3.decode(chat.encode(WHO).ids)
    told = "Cutting Knowledge Date: December 2023\nToday Date: 05 Jan 2031\n\n"
    assert told + "You are a helpful assistant.<|eot_id|>" in text


def test_texts_are_trimmed_so_that_the_header_stays_one_token(llama3):
    chat = make_chat_format(llama3, name="llama3")
    plain = chat.encode([Message("user", "Hello"), Message("assistant", "Hi")])
    padded = chat.encode([Message("user", "\nHello \n"), Message("assistant", "\n\nHi ")])
    assert padded == plain
    assert plain.ids[4:6] == [271, 9906]


def test_what_tools_return_and_texts_before_calls_keep_their_white_space(llama3):
    chat = make_chat_format(llama3, name="llama3")
    call = ToolCall("brave_search", {"query": "x"})
    text = llama3.decode(
        chat.encode([Message("assistant", "See: ", (call,)), Message("tool", "\n{}\n")]).ids
    )
    assert 'See: brave_search.call(query="x")' in text
    assert "ipython<|end_header_id|>\n\n\n{}\n<|eot_id|>" in text


def test_the_mask_covers_texts_calls_and_ends_but_no_header(llama3):
    chat = make_chat_format(llama3)
    call = ToolCall("code_interpreter", {"code": "print(1)"})
    conversation = [
        Message("user", "One?"),
        Message("assistant", "", (call,), ends="message"),
        Message("tool", "1"),
        Message("assistant", "One."),
    ]
    encoded = chat.encode(conversation, add_generation_prompt=True)
    assert written(llama3, encoded) == ["<|python_tag|>print(1)<|eom_id|>", "One.<|eot_id|>"]


def test_what_was_written_follows_the_prompt_that_it_answered(llama3):
    chat = make_chat_format(llama3)
    question, answer = Message("user", "Why?"), Message("assistant", "Because.")
    prompt = chat.encode([question], add_generation_prompt=True).ids
    whole = chat.encode([question, answer])
    assert whole.ids[: len(prompt)] == prompt
    assert whole.mask == [False] * len(prompt) + [True] * 3


def test_the_real_vocabulary_is_that_of_llama_31(llama3):
    assert make_chat_format(llama3).name == "llama3.1"


def test_any_of_three_tokens_ends_a_reply(llama3):
    assert make_chat_format(llama3).stop_tokens == {
        "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"
    }  # fmt: skip


def tools_of(cases):
    return [
        Tool(
            case["tool_name"],
            case["description"],
            {
                name: Parameter(p["param_type"], p["description"], p["required"], p["default"])
                for name, p in case["parameters"].items()
            },
        )
        for case in cases
    ]


@pytest.mark.parametrize(
    ("key", "tools", "tool_format"),
    [
        ("custom_json", "custom", "json"),
        ("custom_json_two", "custom_two", "json"),
        ("custom_function_tag", "custom", "function_tag"),
        ("custom_function_tag_two", "custom_two", "function_tag"),
        ("custom_python_list", "python_list", "python_list"),
    ],
)
def test_tool_instructions_are_word_for_word_the_references(
    chat_reference, key, tools, tool_format
):
    made_from = tools_of(chat_reference["templates_made_from"][tools])
    assert tool_instructions(made_from, tool_format) == chat_reference["templates"][key]


@pytest.mark.parametrize(
    ("key", "builtin", "custom"),
    [
        ("system_default", [], False),
        ("system_builtin", ["code_interpreter", "brave_search", "wolfram_alpha"], False),
        ("system_custom", [], True),
        ("system_both", ["code_interpreter", "brave_search", "wolfram_alpha"], True),
    ],
)
def test_system_headers_are_word_for_word_the_references(chat_reference, key, builtin, custom):
    header = system_header(chat_reference["templates_made_from"]["date"], builtin, custom=custom)
    assert header + "You are a helpful assistant.\n" == chat_reference["templates"][key]


def test_tool_responses_are_word_for_word_the_references(chat_reference):
    texts = chat_reference["templates"]
    assert tool_response("completed", stdout="True") == texts["tool_success"]
    failed = tool_response("failed", stderr="could not reach the search service")
    assert failed == texts["tool_failure"]


SONGS = Tool("songs", "Lists songs", {"n": Parameter("integer", "How many")})


def test_tools_of_ones_own_are_described_in_a_user_message_behind_the_system_message(llama3):
    chat = make_chat_format(llama3)
    text = llama3.decode(chat.encode(WHO, tools=[SONGS]).ids)
    assert "system<|end_header_id|>\n\nEnvironment: ipython\n\nCutting Knowledge Date" in text
    told = tool_instructions([SONGS], "json")
    ask = "<|start_header_id|>user<|end_header_id|>\n\n"
    assert f"{ask}{told}<|eot_id|>{ask}Who are you?<|eot_id|>" in text


def test_tools_may_be_given_as_json_schemas(llama3):
    chat = make_chat_format(llama3, llama3=Llama3Style("python_list"))
    encoded = chat.encode(WHO, tools=[SONGS.to_schema()])
    assert encoded == chat.encode(WHO, tools=[SONGS])
    text = llama3.decode(encoded.ids)
    assert tool_instructions([SONGS], "python_list") + "\n\nYou are a helpful" in text


def test_builtin_tools_stand_in_the_system_message(llama3):
    style = Llama3Style(builtin_tools=("brave_search", "code_interpreter"))
    text = llama3.decode(make_chat_format(llama3, llama3=style).encode(WHO).ids)
    assert "\n\nEnvironment: ipython\nTools: brave_search\nCutting Knowledge Date" in text
    code_alone = Llama3Style(builtin_tools=("code_interpreter",))
    text = llama3.decode(make_chat_format(llama3, llama3=code_alone).encode(WHO).ids)
    assert "\n\nEnvironment: ipython\nCutting Knowledge Date" in text


def test_builtin_tools_need_the_format_that_announces_them(llama3):
    style = Llama3Style(builtin_tools=("brave_search",))
    with pytest.raises(ChatError, match=r"announced by the format 'llama3\.1'"):
        make_chat_format(llama3, name="llama3", llama3=style)


@pytest.mark.short
def test_a_byte_vocabulary_is_enough(byte):
    encoded = make_chat_format(byte, name="llama3").encode(
        [Message("user", "é"), Message("assistant", "ok")]
    )
    text = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\né<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nok<|eot_id|>"
    )
    assert byte.decode(encoded.ids) == text
    assert written(byte, encoded) == ["ok<|eot_id|>"]


def test_a_vocabulary_without_the_end_of_a_message_says_so():
    april = BytesWith("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                      "<|end_header_id|>", "<|eot_id|>")  # fmt: skip
    chat = make_chat_format(april)
    assert (chat.name, chat.stop_tokens) == ("llama3", {"<|end_of_text|>", "<|eot_id|>"})
    with pytest.raises(TokenizerError, match=r"needs the special token <\|eom_id\|>"):
        chat.encode([Message("assistant", "", ends="message")])


def test_a_call_without_its_argument_is_an_error(llama3):
    call = ToolCall("wolfram_alpha", {"q": "1+1"})
    with pytest.raises(ChatError, match="a call of wolfram_alpha needs the argument 'query'"):
        make_chat_format(llama3).encode([Message("assistant", "", (call,))])
