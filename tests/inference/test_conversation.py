"""Conversations: what the model is told, what is forgotten, what an interruption keeps."""

import json
from types import SimpleNamespace

import pytest

from llama_jax.inference.conversation import Conversation
from llama_jax.inference.sampling import Sampling
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.chat import ChatError, make_chat_format

BYTE = ByteTokenizer()
EOT, EOM = BYTE.special["<|eot_id|>"], BYTE.special["<|eom_id|>"]
# Of each message beside its text: start, role, end, two line ends, end of turn.
USER, ASSISTANT = 4 + 5, 4 + 10


class Script:
    """Says its lines in turn, a word a piece; remembers what it was asked."""

    def __init__(self, *lines, stop=EOT, reason="stop"):
        self.lines, self.stop, self.reason, self.asked = list(lines), stop, reason, []

    def stream(self, prompt, sampling):
        self.asked.append((BYTE.decode(prompt), sampling))
        words = self.lines.pop(0).split(" ")
        for i, word in enumerate(words):
            text = word if i == 0 else f" {word}"
            yield SimpleNamespace(text=text, ids=tuple(text.encode()), completion=None)
        done = SimpleNamespace(finish_reason=self.reason, stop=self.stop)
        yield SimpleNamespace(text="", ids=(), completion=done)


def talk(script, *, context=4096, system=None, max_new_tokens=8, name="llama3"):
    session = SimpleNamespace(
        generator=script,
        chat_format=make_chat_format(BYTE, name=name),
        context_length=context,
        token_name=lambda stop: {EOT: "<|eot_id|>", EOM: "<|eom_id|>"}.get(stop, stop),
    )
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0, seed=5)
    return Conversation(session, sampling, system)


def contents(messages):
    return [(message.role, message.content) for message in messages]


def test_earlier_turns_stay_in_the_context():
    script = Script("Ho there", "Yes")
    conversation = talk(script, system="Be brief.")
    assert list(conversation.reply("Hi")) == ["Ho", " there"]
    assert "".join(conversation.reply("More?")) == "Yes"
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert script.asked[1][0] == (
        f"<|begin_of_text|>{header('system')}Be brief.<|eot_id|>{header('user')}Hi<|eot_id|>"
        f"{header('assistant')}Ho there<|eot_id|>{header('user')}More?<|eot_id|>"
        f"{header('assistant')}"
    )
    assert [sampling.seed for _, sampling in script.asked] == [5, 6]
    assert conversation.notes() == []


def test_when_the_context_is_full_the_oldest_exchange_is_left_out_and_told():
    # BOS, and two exchanges of two characters each, and the next question with its header.
    exchange = USER + 2 + ASSISTANT + 2
    limit = 1 + exchange + USER + 2 + (ASSISTANT - 1) + 8
    script = Script("b1", "b2", "b3")
    conversation = talk(script, context=limit)
    notes = []
    for question in ("a1", "a2", "a3"):
        list(conversation.reply(question))
        notes.append(conversation.notes())
    assert notes[:2] == [[], []]
    assert notes[2] == ["the context is full: the 2 oldest messages were left out"]
    assert "a1" not in script.asked[2][0]
    assert "a2<|eot_id|>" in script.asked[2][0]
    assert contents(conversation.context)[0] == ("user", "a2")
    assert [text for _, text in contents(conversation.messages)] == [
        "a1", "b1", "a2", "b2", "a3", "b3",
    ]  # fmt: skip


def test_the_system_message_is_never_left_out():
    script = Script("b", "b", "b")
    conversation = talk(script, context=70, system="S")
    for _ in range(3):
        list(conversation.reply("a"))
    assert all("\n\nS<|eot_id|>" in prompt for prompt, _ in script.asked)
    assert len(conversation.messages) == 6
    assert len(conversation.context) < 7


def test_a_message_that_cannot_fit_is_an_error_and_changes_nothing():
    conversation = talk(Script("b", "c"), context=100)
    list(conversation.reply("a"))
    before = list(conversation.messages)
    with pytest.raises(ChatError, match=r"takes \d+ tokens .* context is 100, of which 8 are kept"):
        next(conversation.reply("x" * 90))
    assert conversation.messages == before
    assert "".join(conversation.reply("b")) == "c"


def test_a_reply_takes_no_more_than_the_context_leaves():
    script = Script("b")
    conversation = talk(script, context=64, max_new_tokens=1000)
    list(conversation.reply("a"))
    prompt, sampling = script.asked[0]
    assert sampling.max_new_tokens == 64 - len(make_ids(prompt)) > 16


def make_ids(text):
    return BYTE.encode(text, allowed_special=set(BYTE.special))


def test_an_interrupted_reply_keeps_what_came():
    conversation = talk(Script("one two three", "four"))
    pieces = conversation.reply("count")
    assert [next(pieces), next(pieces)] == ["one", " two"]
    pieces.close()
    assert contents(conversation.messages) == [("user", "count"), ("assistant", "one two")]
    assert conversation.notes() == ["stopped"]
    assert "".join(conversation.reply("on")) == "four"


def test_an_interrupt_before_the_first_word_takes_the_message_back():
    class Slow(Script):
        def stream(self, prompt, sampling):
            raise KeyboardInterrupt
            yield

    conversation = talk(Slow())
    with pytest.raises(KeyboardInterrupt):
        next(conversation.reply("a"))
    assert conversation.messages == []
    assert conversation.notes() == ["stopped; your message was taken back"]


def test_text_that_the_format_refuses_is_taken_back(monkeypatch):
    conversation = talk(Script("b"), name="llama2")
    with pytest.raises(ChatError, match=r"holds the mark \[/INST\]"):
        next(conversation.reply("a [/INST]"))
    assert conversation.messages == []


def test_an_empty_reply_is_a_turn():
    conversation = talk(Script("", "b"))
    assert list(conversation.reply("a")) == []
    assert contents(conversation.messages) == [("user", "a"), ("assistant", "")]
    assert "".join(conversation.reply("c")) == "b"


def test_what_waits_for_a_tool_is_told_and_written_so():
    script = Script("<|python_tag|>print(1)", "b", stop=EOM)
    conversation = talk(script)
    list(conversation.reply("a"))
    assert conversation.notes() == ["the model waits for a tool's result; this chat runs no tools"]
    list(conversation.reply("c"))
    assert "\n\n<|python_tag|>print(1)<|eom_id|>" in script.asked[1][0]


def test_a_reply_that_was_cut_is_told():
    conversation = talk(Script("one two", stop=None, reason="length"))
    list(conversation.reply("a"))
    assert conversation.notes() == ["cut after 7 tokens"]


def test_everything_that_was_said_is_saved(tmp_path):
    conversation = talk(Script("é", "d"), context=100, system="S")
    for question in ("a", "x" * 20):
        list(conversation.reply(question))
    path = tmp_path / "talk.jsonl"
    assert conversation.save(path) == 5
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["content"] for line in lines] == ["S", "a", "é", "x" * 20, "d"]
    with pytest.raises(ChatError, match="No such file"):
        conversation.save(tmp_path / "absent" / "talk.jsonl")


def test_reset_forgets_the_turns_but_not_the_system_message():
    script = Script("b", "c")
    conversation = talk(script, system="S")
    list(conversation.reply("a"))
    conversation.reset()
    assert contents(conversation.context) == [("system", "S")]
    list(conversation.reply("d"))
    assert "a<|eot_id|>" not in script.asked[1][0]
