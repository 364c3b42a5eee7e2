"""Replies to content, stop reason and calls; what was written is read back."""

import keyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.tokenizers.chat import ToolCall, parse_reply
from llama_jax.tokenizers.chat.calls import write_calls, write_tool_call_block
from llama_jax.tokenizers.chat.parsing import Reply


def test_every_reply_of_the_reference_is_read_as_there(chat_reference):
    assert len(chat_reference["parse"]) == 14
    for case in chat_reference["parse"]:
        reply = parse_reply(case["text"], parallel=False)
        calls = [{"tool_name": c.name, "arguments": c.arguments} for c in reply.tool_calls]
        got = {"content": reply.content, "stop_reason": reply.stop_reason, "tool_calls": calls}
        assert got == {key: case[key] for key in got}, case["text"]


def test_parallel_pythonic_calls_are_all_read():
    reply = parse_reply("[weather(city='SF', days=3), weather(city=\"LA\", exact=True)]<|eot_id|>")
    assert reply.tool_calls == (
        ToolCall("weather", {"city": "SF", "days": 3}),
        ToolCall("weather", {"city": "LA", "exact": True}),
    )


@pytest.mark.parametrize(
    "text",
    [
        "[f('x')]", "[f(**{'a': 1})]", "[a.f(x=1)]", "[f(x=g(y=1))]", "f(x=1)", "[]", "[f(x=1), 2]",
        '{"name": "Ada", "born": 1815}', '{"name": "f", "parameters": {}} {"a": 1}',
        '{"name": "f", "parameters": {}} or so', "<function=f>{broken}</function>", "[" * 5000,
        "<tool_call>soon</tool_call>",
    ],
)  # fmt: skip
def test_what_is_not_exactly_a_call_is_content(text):
    assert parse_reply(text) == Reply(text, "end_of_turn")


def test_a_chatml_reply_loses_its_marks():
    text = "<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>"
    assert parse_reply(text) == Reply("The capital of France is Paris.", "end_of_turn")


def test_tool_call_blocks_are_read_with_the_text_beside_them():
    text = 'Let me see. <tool_call>[{"name": "f", "arguments": {"a": 1}}]</tool_call><|im_end|>'
    assert parse_reply(text) == Reply("Let me see.", "end_of_turn", (ToolCall("f", {"a": 1}),))
    single = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    assert parse_reply(single).tool_calls == (ToolCall("g", {}),)


def test_the_stop_token_that_generation_removed_decides_the_reason():
    code = "<|python_tag|>print(1)"
    assert parse_reply(code, stop="<|eom_id|>").stop_reason == "end_of_message"
    assert parse_reply(code, stop="<|eot_id|>").stop_reason == "end_of_turn"
    message = parse_reply(code, stop="<|eom_id|>").to_message()
    assert (message.ends, message.tool_calls[0].arguments) == ("message", {"code": "print(1)"})


def test_function_tags_may_hold_nested_objects_and_lack_their_end():
    nested = '<function=f>{"a": {"b": {"c": 1}}}</function>'
    assert parse_reply(nested).tool_calls == (ToolCall("f", {"a": {"b": {"c": 1}}}),)
    assert parse_reply('<function=f>{"a": 1}').tool_calls == (ToolCall("f", {"a": 1}),)


leaves = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                               max_size=3),
    max_leaves=6,
)  # fmt: skip
names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name)
)
calls = st.builds(ToolCall, names, st.dictionaries(names, values, max_size=3))


@pytest.mark.parametrize("tool_format", ["json", "python_list"])
@given(call=calls)
def test_a_written_call_is_read_back(tool_format, call):
    (text,) = write_calls([call], tool_format)
    assert parse_reply(text).tool_calls == (call,)


@given(call=calls.filter(lambda call: "</function>" not in str(call)))
def test_a_call_in_a_function_tag_is_read_back(call):
    (text,) = write_calls([call], "function_tag")
    assert parse_reply(text).tool_calls == (call,)


@given(written=st.lists(calls.filter(lambda call: "</tool" not in str(call)), min_size=1,
                        max_size=3))  # fmt: skip
def test_parallel_calls_are_read_back(written):
    pythonic = "".join(write_calls(written, "python_list"))
    assert parse_reply(pythonic).tool_calls == tuple(written)
    assert parse_reply(write_tool_call_block(written)).tool_calls == tuple(written)
    for between in ("", "; ", "\n"):
        in_json = between.join(write_calls(written, "json"))
        assert parse_reply(in_json).tool_calls == tuple(written)
