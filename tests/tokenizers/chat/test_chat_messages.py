"""Messages to and from their JSON forms."""

import pytest

from llama_jax.tokenizers.chat import (
    ChatError,
    Message,
    ToolCall,
    message_from_json,
    message_to_json,
    messages_from_json,
)


def test_the_usual_forms_give_the_same_message():
    call = ToolCall("f", {"a": 1})
    wanted = Message("assistant", "Hi there", (call,))
    openai = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    for calls in ([openai], [{"name": "f", "arguments": {"a": 1}}],
                  [{"tool_name": "f", "call_id": "1", "arguments": {"a": 1}}]):  # fmt: skip
        parts = [{"type": "text", "text": "Hi"}, " there"]
        entry = {"role": "assistant", "content": parts, "tool_calls": calls}
        assert message_from_json(entry) == wanted
    assert message_from_json({"role": "user", "content": None}) == Message("user", "")


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"role": "developer", "content": "a"}, Message("system", "a")),
        ({"role": "function", "name": "f", "content": "3"}, Message("tool", "3")),
        (
            {"role": "assistant", "content": None,
             "function_call": {"name": "f", "arguments": '{"a": 1}'}},
            Message("assistant", "", (ToolCall("f", {"a": 1}),)),
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"a": 1}}]},
            Message("assistant", "", (ToolCall("f", {"a": 1}),)),
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
            Message("assistant", "", (ToolCall("f", {}),)),
        ),
    ],
)  # fmt: skip
def test_older_and_later_names_lose_nothing(entry, wanted):
    assert message_from_json(entry) == wanted


def test_a_weight_of_0_says_that_a_message_is_not_learned():
    for weight, learned in ((0, False), (1, True), (None, True)):
        entry = {"role": "assistant", "content": "a", "weight": weight}
        assert message_from_json(entry).learned is learned


def test_a_message_survives_its_json():
    for message in [
        Message("user", "a", context="b"),
        Message("assistant", "", (ToolCall("f", {"x": [1]}),), ends="message"),
        Message("tool", "c"),
        Message("assistant", "d", learned=False),
    ]:
        assert message_from_json(message_to_json(message)) == message
    assert message_to_json(Message("user", "a")) == {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("hi", "message 2: a message is an object with a 'role', got 'hi'"),
        ({"content": "a"}, "message 2: a message is an object with a 'role'"),
        ({"role": "user", "content": 3}, "message 2: 'content' is not a text: 3"),
        ({"role": "user", "content": [{"type": "image"}]}, "message 2: only text parts"),
        ({"role": "assistant", "tool_calls": [{}]}, "message 2: a tool call needs a 'name'"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]},
         "message 2: the arguments of a call of 'f' are not an object"),
        ({"role": "assistant", "tool_calls": {"f": 1}}, "message 2: 'tool_calls' is not a list"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "message 2: 'weight' is 0 or 1"),
    ],
)  # fmt: skip
def test_another_form_is_an_error_that_says_where(entry, complaint):
    with pytest.raises(ChatError, match=complaint):
        messages_from_json([{"role": "user", "content": "a"}, entry])
