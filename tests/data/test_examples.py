"""Records as examples: what is trained on in each chat format, turns dropped, rows by hand."""

import dataclasses

import numpy as np
import pytest
from chat_bytes import CHATML, LLAMA2, LLAMA3, data_config, lines, marked, opened, said

from llama_jax.config.loading import ConfigError
from llama_jax.data.batches import GlobalBatches
from llama_jax.data.documents import DataError
from llama_jax.data.encoding import Encoder
from llama_jax.data.examples import example_from_bytes
from llama_jax.data.records import Conversation, Pair, Preference, RecordError, Response
from llama_jax.tokenizers.chat import Message, ToolCall, make_chat_format

pytestmark = pytest.mark.short

TALK = [
    Message("system", "Be brief."),
    Message("user", "Who?"),
    Message("assistant", "Me."),
    Message("user", "Why?"),
    Message("assistant", "So."),
]


def encoder(tokenizer, name, seq_len=256, truncate="end"):
    return Encoder(tokenizer, make_chat_format(tokenizer, name=name), seq_len, truncate)


def text(tokenizer, example):
    return tokenizer.decode(example.tokens.tolist())


def labelled(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


@pytest.mark.parametrize(
    ("tokenizer", "name", "answers"),
    [
        (LLAMA3, "llama3", ["Me.<|eot_id|>", "So.<|eot_id|>"]),
        (CHATML, "chatml", ["Me.<|im_end|>", "So.<|im_end|>"]),
        (LLAMA2, "llama2", [" Me. </s>", " So. </s>"]),
    ],
)
def test_the_loss_is_on_answers_with_the_ends_of_their_turns(tokenizer, name, answers):
    for train_on, wanted in (("all", answers), ("last", answers[1:])):
        made = encoder(tokenizer, name).conversation(Conversation(tuple(TALK)), train_on)
        assert marked(tokenizer, made.example) == wanted
        # Nothing stands behind the last end, such as ChatML's line end.
        assert text(tokenizer, made.example).endswith(answers[1])
        assert (made.turns, made.dropped_turns) == (2, 0)
        assert made.example.segments.tolist() == [1] * len(made.example)


def test_calls_of_tools_belong_to_the_turn_that_they_serve():
    messages = (
        *TALK,
        Message("user", "1+2?"),
        Message("assistant", "", (ToolCall("add", {"a": 1}),), ends="message"),
        Message("tool", "3"),
        Message("assistant", "Three."),
    )
    made = encoder(LLAMA3, "llama3.1", 1024).conversation(Conversation(messages), "last")
    call, answer = marked(LLAMA3, made.example)
    assert "add" in call
    assert call.endswith("<|eom_id|>")
    assert answer == "Three.<|eot_id|>"


def test_messages_of_weight_0_are_read_but_not_learned():
    messages = list(TALK)
    messages[2] = dataclasses.replace(messages[2], learned=False)
    made = encoder(LLAMA3, "llama3").conversation(Conversation(tuple(messages)), "all")
    assert marked(LLAMA3, made.example) == ["So.<|eot_id|>"]
    assert "Me.<|eot_id|>" in text(LLAMA3, made.example)
    messages[4] = dataclasses.replace(messages[4], learned=False)
    with pytest.raises(RecordError, match="no message of the assistant that is learned"):
        encoder(LLAMA3, "llama3").conversation(Conversation(tuple(messages)), "all")


def test_turns_that_are_dropped_never_leave_a_row_with_nothing_to_learn():
    learned = (*TALK[1:3], *(dataclasses.replace(m, learned=m.role != "assistant") for m in TALK))
    conversation = Conversation((TALK[0], *learned[:2], *learned[3:]))
    whole = len(encoder(LLAMA3, "llama3").conversation(conversation, "all").example)
    for seq_len in (whole // 2, whole - 1):
        with pytest.raises(RecordError, match="fit a row"):
            encoder(LLAMA3, "llama3", seq_len, "start").conversation(conversation, "all")
    made = encoder(LLAMA3, "llama3", whole - 1, "end").conversation(conversation, "all")
    assert marked(LLAMA3, made.example) == ["Me.<|eot_id|>"]


def test_where_the_last_turn_alone_is_learned_no_other_takes_its_place():
    whole = len(encoder(LLAMA3, "llama3").conversation(Conversation(tuple(TALK)), "all").example)
    short = encoder(LLAMA3, "llama3", whole - 1, "start")
    made = short.conversation(Conversation(tuple(TALK)), "last")
    assert (marked(LLAMA3, made.example), made.dropped_turns) == (["So.<|eot_id|>"], 1)
    with pytest.raises(RecordError, match="fit a row") as refused:
        encoder(LLAMA3, "llama3", whole - 1, "end").conversation(Conversation(tuple(TALK)), "last")
    assert refused.value.reason == "too_long"


@pytest.mark.parametrize("shared_prompt", [False, True])
@pytest.mark.parametrize(("tokenizer", "name"), [(LLAMA3, "llama3"), (CHATML, "chatml")])
def test_what_a_tool_returned_is_no_part_of_a_responses_likelihood(tokenizer, name, shared_prompt):
    call = Message("assistant", "", (ToolCall("add", {"a": 1}),))
    long = (call, Message("tool", "returned"), Message("assistant", "Three."))
    record = Preference(
        (Message("user", "1 + 2?"),),
        (Response(long, "chosen"), Response((Message("assistant", "No."),), "rejected")),
        (Pair(1, 2, "better"),),
    )
    example = (
        encoder(tokenizer, name, 512)
        .preference(record, shared_prompt=shared_prompt, mask_formatting=True)
        .example
    )
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    told = tokenizer.decode(example.tokens[np.flatnonzero(example.responses == 1) + 1].tolist())
    assert told.endswith(f"{end}Three.{end}")
    assert "add" in told
    assert "returned" not in told
    assert "returned" in text(tokenizer, example)


@pytest.mark.parametrize("truncate", ["end", "start"])
@pytest.mark.parametrize(("tokenizer", "name"), [(LLAMA3, "llama3"), (CHATML, "chatml")])
def test_whole_turns_are_dropped_at_every_length(tokenizer, name, truncate):
    turns = [
        (Message("user", f"question {i}" * (1 + i % 3)), Message("assistant", f"answer {i}"))
        for i in range(6)
    ]
    messages = (Message("system", "Be brief."), *(m for turn in turns for m in turn))
    chat = make_chat_format(tokenizer, name=name)
    # What it comes to with so many turns, by the format alone.
    wanted = {}
    for count in range(1, 7):
        kept = turns[:count] if truncate == "end" else turns[-count:]
        encoded = chat.encode([messages[0], *(m for turn in kept for m in turn)])
        stop = max(i for i, written in enumerate(encoded.mask) if written) + 1
        wanted[count] = encoded.ids[:stop]
    borders = {len(ids) + more for ids in wanted.values() for more in (-1, 0, 7)}
    for seq_len in sorted(borders - {len(wanted[1]) - 1}):
        made = encoder(tokenizer, name, seq_len, truncate).conversation(
            Conversation(messages), "all"
        )
        most = max(count for count, ids in wanted.items() if len(ids) <= seq_len)
        assert made.example.tokens.tolist() == wanted[most]
        assert (made.turns, made.dropped_turns) == (most, 6 - most)
        assert len(marked(tokenizer, made.example)) == most
    with pytest.raises(RecordError, match=r"\d+ tokens, \d+ fit a row"):
        encoder(tokenizer, name, len(wanted[1]) - 1, truncate).conversation(
            Conversation(messages), "all"
        )
    with pytest.raises(RecordError, match="fit a row"):
        encoder(tokenizer, name, len(wanted[6]) - 1, "drop").conversation(
            Conversation(messages), "all"
        )


def test_a_conversation_that_the_format_can_not_write_is_named(tmp_path):
    records = [said("a", "b"), {"messages": [{"role": "assistant", "content": "b"}]}]
    config = data_config(
        lines(tmp_path / "c.jsonl", records), "conversations", chat_format="llama2"
    )
    summary = opened(config, tmp_path / "run", tokenizer=LLAMA2).manifest.summary
    assert summary.skipped == {"inexpressible": 1}
    assert summary.problems[0].startswith("c.jsonl:2: inexpressible (message 1 is the assistant's")


def test_a_template_that_is_no_text_is_named(tmp_path):
    path, template = lines(tmp_path / "c.jsonl", [said("a", "b")]), tmp_path / "chat.jinja"
    template.write_bytes(b"{{ \xff }}")
    config = data_config(path, "conversations", chat_template=str(template))
    with pytest.raises(ConfigError, match=r"chat_template: .*chat\.jinja: not UTF-8, byte 3"):
        opened(config, tmp_path / "run")


def one_row(tmp_path, records, *, kind="preferences", rows=None, loss_on="responses", **source):
    config = data_config(
        lines(tmp_path / "r.jsonl", records), kind, batch_size=1, chat_format="llama2",
        rows=rows, **{"seq_len": 48, **source},
    )  # fmt: skip
    documents = opened(config, tmp_path / "run", tokenizer=LLAMA2, loss_on=loss_on)
    return documents, GlobalBatches(config, [documents], seed=0).batch(0, [0])


def spelled(batch, name="tokens"):
    return "".join({256: "<", 257: ">", 0: "_"}.get(i, chr(i)) for i in batch[name][0].tolist())


def digits(batch, name):
    return "".join(str(int(value)) for value in batch[name][0])


def test_a_row_of_two_conversations_by_hand(tmp_path):
    _, batch = one_row(tmp_path, [said("a", "bc"), said("d", "e")], kind="conversations")
    assert spelled(batch) == "<[INST] a [/INST] bc ><[INST] d [/INST] e >_____"
    assert spelled(batch, "targets") == "[INST] a [/INST] bc >_[INST] d [/INST] e >______"
    assert digits(batch, "loss_mask") == "0" * 16 + "11111" + "0" * 17 + "1111" + "0" * 6
    assert digits(batch, "segment_ids") == "1" * 22 + "2" * 21 + "0" * 5
    assert batch["positions"][0].tolist() == [*range(22), *range(21), *[0] * 5]
    assert set(batch) == {"tokens", "targets", "loss_mask", "positions", "segment_ids"}


def test_a_row_of_one_preference_by_hand(tmp_path):
    records = [pair("a", "bc", "d", strength="slightly")]
    _, batch = one_row(tmp_path, records, rows={"responses_per_row": 3})
    assert spelled(batch) == "<[INST] a [/INST] bc ><[INST] a [/INST] d >_____"
    # The end of the turn doesn't count, but its place belongs to the response.
    assert digits(batch, "loss_mask") == "0" * 16 + "11110" + "0" * 17 + "1110" + "0" * 6
    assert digits(batch, "response_ids") == "0" * 16 + "11111" + "0" * 17 + "2222" + "0" * 6
    assert digits(batch, "segment_ids") == "1" * 22 + "2" * 21 + "0" * 5
    for name, wanted in (("chosen", [1, 0, 0]), ("rejected", [2, 0, 0]), ("strength", [1, 0, 0]),
                         ("roles", [1, 2, 0])):  # fmt: skip
        assert batch[name].tolist() == [wanted]


def test_ends_of_turns_count_where_formatting_is_not_masked(tmp_path):
    _, batch = one_row(tmp_path, [pair("a", "bc", "d")], mask_formatting=False)
    assert digits(batch, "loss_mask") == "0" * 16 + "11111" + "0" * 17 + "1111" + "0" * 6


def test_a_reward_model_reads_the_last_token_of_each_response(tmp_path):
    _, batch = one_row(tmp_path, [pair("a", "bc", "d")], loss_on="last")
    assert np.flatnonzero(batch["loss_mask"][0]).tolist() == [21, 42]
    assert batch["tokens"][0, [21, 42]].tolist() == [257, 257]
    assert batch["response_ids"][0, [20, 21, 22, 41, 42]].tolist() == [1, 1, 0, 2, 2]


def test_responses_behind_one_prompt_are_one_segment(tmp_path):
    documents, batch = one_row(tmp_path, [pair("a", "bc", "d")], shared_prompt=True, loss_on="last")
    told = spelled(batch)
    assert told.rstrip("_") in {
        "<[INST] a [/INST] bc > d >",
        "<[INST] a [/INST] d > bc >",
    }
    assert digits(batch, "segment_ids") == "1" * 26 + "0" * 22
    assert batch["positions"][0, :26].tolist() == list(range(26))
    ends = {"bc": told.index("bc >") + 3, "d": told.index(" d >") + 3}
    assert sorted(np.flatnonzero(batch["loss_mask"][0])) == sorted(ends.values())
    assert batch["response_ids"][0, [ends["bc"], ends["d"]]].tolist() == [1, 2]
    # Only a reward model may: in a log-probability the responses would see each other.
    with pytest.raises(ConfigError, match=r"shared_prompt.*only a reward model may share"):
        one_row(tmp_path, [pair("a", "bc", "d")], shared_prompt=True)
    assert documents.lengths.tolist() == [26]


def test_shared_prompts_shuffle_the_responses(tmp_path):
    records = [pair(f"{i}", "good", "bad") for i in range(40)]
    config = data_config(lines(tmp_path / "p.jsonl", records), "preferences", shared_prompt=True)
    examples = opened(config, tmp_path / "run", loss_on="last").read(range(40))
    first = [int(example.lasts[0] < example.lasts[1]) for example in examples]
    assert 8 < sum(first) < 32


def test_an_edited_record_and_several_records_in_a_row_number_their_responses(tmp_path):
    records = [pair("a", "b", "c", edited="d", strength="marginally"), pair("e", "f", "g")]
    _, batch = one_row(tmp_path, records, seq_len=128, rows={"responses_per_row": 6})
    assert batch["roles"].tolist() == [[1, 2, 3, 1, 2, 0]]
    assert batch["chosen"].tolist() == [[1, 3, 3, 4, 0, 0]]
    assert batch["rejected"].tolist() == [[2, 1, 2, 5, 0, 0]]
    assert batch["strength"].tolist() == [[0, 2, 3, 2, 0, 0]]
    starts = [int(np.flatnonzero(batch["response_ids"][0] == r)[0]) for r in range(1, 6)]
    assert [chr(batch["targets"][0, place + 1]) for place in starts] == ["b", "c", "d", "f", "g"]


def test_mismatched_responses_are_of_other_records(tmp_path):
    records = [pair("1", "a", "b"), pair("2", "c", "d"), pair("3", "e", "f")]
    config = data_config(lines(tmp_path / "p.jsonl", records), "preferences", mismatched=True)
    examples = opened(config, tmp_path / "run").read(range(3))
    assert [e.roles.tolist() for e in examples] == [[1, 2, 4]] * 3
    others = []
    for number, example in enumerate(examples):
        (segment,) = np.flatnonzero(example.segments == 3)[:1]
        told = LLAMA3.decode(example.tokens[segment:].tolist())
        assert f"{number + 1}<|eot_id|>" in told  # this record's prompt
        others.append(told.removesuffix("<|eot_id|>")[-1])
    assert others == ["c", "f", "a"]
    assert opened(config, tmp_path / "run").manifest.summary.responses["mismatched"] == 3
    one = data_config(lines(tmp_path / "o.jsonl", records[:1]), "preferences", mismatched=True)
    with pytest.raises(DataError, match="need more than one prompt"):
        opened(one, tmp_path / "one")


def test_single_responses_are_examples_without_pairs(tmp_path):
    records = [labelled("a", "bc", True), labelled("a", "d", False), labelled("e", "f", True)]
    source = {"mismatched": True, "chat_format": "llama2"}
    path, rows = lines(tmp_path / "u.jsonl", records), {"responses_per_row": 4}
    config = data_config(path, "preferences", seq_len=96, batch_size=1, rows=rows, **source)
    documents = opened(config, tmp_path / "run", tokenizer=LLAMA2)
    assert [e.roles.tolist() for e in documents.read(range(3))] == [[1, 4], [2, 4], [1, 4]]
    # What answers the same prompt is no mismatched response; the last one gets one of the first.
    wanted = ["[INST] a [/INST] f ", "[INST] a [/INST] f ", "[INST] e [/INST] bc "]
    assert [LLAMA2.decode(e.tokens[e.segments == 2].tolist(), skip_special=True)
            for e in documents.read(range(3))] == wanted  # fmt: skip
    assert documents.slots.tolist() == [2, 2, 2]
    plan = GlobalBatches(config, [documents], seed=0)
    first, second = plan.batch(0, [0]), plan.batch(1, [0])
    assert sorted([first["roles"].tolist(), second["roles"].tolist()]) in (
        [[[1, 4, 0, 0]], [[1, 4, 2, 4]]], [[[1, 4, 0, 0]], [[2, 4, 1, 4]]],
        [[[1, 4, 1, 4]], [[2, 4, 0, 0]]],
    )  # fmt: skip
    for name in ("chosen", "rejected", "strength"):
        assert not first[name].any()
    summary = documents.manifest.summary
    assert summary.responses == {"chosen": 2, "mismatched": 3, "rejected": 1}
    told = list(summary.lines())
    assert "responses: 2 chosen, 3 mismatched, 1 rejected" in told
    assert not any(line.startswith("pairs") for line in told)
    assert LLAMA2.decode(first["tokens"][0, :6].tolist()).startswith("<s>[INST")


def test_single_responses_are_left_out_where_the_loss_is_of_pairs(tmp_path):
    records = [labelled("a", "bc", True), pair("a", "b", "c"), labelled("e", "f", False)]
    path = lines(tmp_path / "u.jsonl", records)
    summary = opened(data_config(path, "preferences"), tmp_path / "run").manifest.summary
    assert (summary.examples, summary.skipped) == (1, {"no_pair": 2})
    reason = "no pair (a single response, which only loss 'kto' reads, with mismatched = true)"
    assert summary.problems == [f"u.jsonl:1: {reason}", f"u.jsonl:3: {reason}"]
    alone = lines(tmp_path / "alone.jsonl", records[:1])
    with pytest.raises(DataError, match=r"left out: 1 no_pair; first: alone\.jsonl:1: no pair \("):
        opened(data_config(alone, "preferences"), tmp_path / "alone")


def test_prompts_lose_their_oldest_turns_and_responses_are_never_cut(tmp_path):
    prompt = [*said("first " * 9, "one", "second", "two", "third")["messages"]]
    path = lines(tmp_path / "p.jsonl", [pair(prompt, "yes", "no"), pair("x" * 300, "yes", "no")])
    made = opened(data_config(path, "preferences", seq_len=200), tmp_path / "run")
    summary = made.manifest.summary
    assert (summary.truncated, summary.dropped_turns) == (1, 1)
    assert summary.truncations == ["p.jsonl:1: 1 turns"]
    assert summary.skipped == {"too_long": 1}
    told = LLAMA3.decode(made.read([0])[0].tokens.tolist())
    assert told.count("second") == told.count("third") == 2
    assert "first" not in told
    with pytest.raises(DataError, match=r"no record that can be used; left out: 2 too_long; first"):
        opened(data_config(path, "preferences", seq_len=200, truncate="drop"), tmp_path / "drop")


def test_strengths_and_numbers_of_responses_decide_what_is_kept(tmp_path):
    records = [
        pair("1", "a", "b", strength="slightly"),
        pair("2", "a", "b", strength="significantly"),
        {"prompt": "3", "responses": list("abcd"), "ranking": [0, 1, 2, 3]},
    ]
    path = lines(tmp_path / "p.jsonl", records)
    config = data_config(
        path, "preferences", rows={"responses_per_row": 5}, strengths=["significantly", "better"]
    )
    summary = opened(config, tmp_path / "run").manifest.summary
    assert summary.skipped == {"other_strength": 1, "too_many_responses": 1}
    assert summary.problems == [
        "p.jsonl:1: other strength (slightly)",
        "p.jsonl:3: too many responses (4 responses, 6 pairs; data.responses_per_row is 5)",
    ]
    assert summary.pairs == {"significantly": 1}


def test_examples_come_back_from_disk_as_they_were():
    made = encoder(LLAMA3, "llama3").conversation(Conversation(tuple(TALK)), "all").example
    again = example_from_bytes(made.to_bytes())
    for field in dataclasses.fields(made):
        if getattr(made, field.name) is not None:
            np.testing.assert_array_equal(getattr(again, field.name), getattr(made, field.name))
    with pytest.raises(DataError, match="a stored example of"):
        example_from_bytes(made.to_bytes()[:-1])
