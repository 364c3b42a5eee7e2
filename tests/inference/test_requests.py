"""Prompts and conversations from files, and their ids."""

import json

import pytest

from llama_jax.config.loading import ConfigError
from llama_jax.inference.requests import (
    Request,
    as_conversation,
    encode_request,
    parse_requests,
    read_requests,
)
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.chat import Message, make_chat_format


@pytest.mark.short
def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\r\n\n  two é\n{not json}\n".encode())
    prompts = [Request(prompt=text) for text in ("one", "  two é", "{not json}")]
    assert read_requests(path) == prompts


def test_json_lines_hold_prompts_messages_and_tools():
    tool = {"type": "function", "function": {"name": "f"}}
    lines = [
        json.dumps({"id": 7, "prompt": "{"}),
        "",
        json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": [tool]}),
        json.dumps({"prompt": [{"role": "user", "content": "b"}]}),
    ]
    assert parse_requests(lines, "x") == [
        Request(prompt="{"),
        Request(messages=(Message("user", "a"),), tools=(tool,)),
        Request(messages=(Message("user", "b"),)),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("text", r"x:2: not a JSON object with 'prompt' or 'messages'"),
        ('{"text": "a"}', r"x:2: not a JSON object with 'prompt' or 'messages'"),
        ('{"prompt": 3}', r"x:2: prompt: neither a text nor messages"),
        ('{"messages": []}', r"x:2: messages: empty"),
        ('{"messages": [{"role": "usr"}]}', r"x:2: message 1: unknown role 'usr' \(did you mean"),
        ('{"prompt": "a", "messages": []}', r"x:2: .* exclude each other"),
        ('{"prompt": "a", "tools": "f"}', r"x:2: tools: not a list of objects"),
    ],
)
def test_a_line_in_another_form_is_an_error_with_its_number(line, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_requests(['{"prompt": "a"}', line], "x")


def test_a_file_that_is_absent_or_empty_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.txt: No such file"):
        read_requests(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match=r"empty\.txt: no prompts in it"):
        read_requests(tmp_path / "empty.txt")


def test_a_prompt_becomes_a_users_message_behind_the_system_message():
    assert as_conversation(Request(prompt="a"), "s").messages == (
        Message("system", "s"),
        Message("user", "a"),
    )
    own = Request(messages=(Message("system", "t"), Message("user", "a")))
    assert as_conversation(own, None) == own
    with pytest.raises(ConfigError, match=r"--system: .*system message already"):
        as_conversation(own, "s")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_plain_prompt_begins_with_one_bos_where_the_models_prompts_do(adds_bos, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "adds_bos", adds_bos)
    byte = ByteTokenizer()
    ids = encode_request(Request(prompt="<|begin_of_text|>"), byte, None)
    assert ids == [256] * adds_bos + list(b"<|begin_of_text|>")


def test_a_conversation_ends_with_the_header_of_the_reply():
    byte = ByteTokenizer()
    request = Request(messages=(Message("user", "a"),))
    text = byte.decode(encode_request(request, byte, make_chat_format(byte, name="llama3")))
    assert text.endswith("\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert text.count("<|begin_of_text|>") == 1
