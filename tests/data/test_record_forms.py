"""Conversations, prompts and preferences out of the forms that are about, and what is refused."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from chat_bytes import lines, said

from llama_jax.config.data import ConversationsConfig, PreferencesConfig, PromptsConfig
from llama_jax.data.reading import Problem
from llama_jax.data.record_source import read_conversations, read_preferences, read_prompts
from llama_jax.data.records import conversation_to_json, preference_to_json

pytestmark = pytest.mark.short

CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {}}}}]
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Thanks."},
    ],
    "tools": TOOLS,
}
SHAREGPT = {
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Three."},
    ],
    "tools": json.dumps(TOOLS),
}


def conversations(path, **changes):
    return list(read_conversations(ConversationsConfig(str(path), **changes)))


def preferences(path, records, **changes):
    return list(read_preferences(PreferencesConfig(lines(path, records), **changes)))


def problems(found):
    assert all(isinstance(item, Problem) for item in found), found
    return [str(item) for item in found]


def test_openai_and_sharegpt_say_the_same_conversation(tmp_path):
    found = conversations(lines(tmp_path / "both.jsonl", [OPENAI, SHAREGPT]))
    openai, sharegpt = found
    # The unanswered thanks teach nothing and are left away.
    assert openai.messages == sharegpt.messages
    assert [m.role for m in openai.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert openai.messages[2].tool_calls[0].arguments == {"a": 1, "b": 2}
    assert openai.tools == sharegpt.tools
    assert openai.tools[0].name == "add"
    assert (openai.line, sharegpt.line) == (1, 2)
    again = conversations(lines(tmp_path / "again.jsonl", [conversation_to_json(openai)]))
    assert again[0].messages == openai.messages


@pytest.mark.parametrize("call", ["function_call", "tool_call"])
@pytest.mark.parametrize("answer", ["observation", "function", "tool_response"])
def test_sharegpts_speakers_of_tools_go_by_several_names(tmp_path, call, answer):
    llama = {"name": "add", "parameters": {"a": 1, "b": 2}}
    said = [("human", "1 + 2?"), (call, json.dumps(llama)), (answer, "3"), ("gpt", "Three.")]
    record = {"conversations": [{"from": who, "value": value} for who, value in said]}
    (found,) = conversations(lines(tmp_path / "s.jsonl", [record]))
    assert [m.role for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1].tool_calls[0].arguments == {"a": 1, "b": 2}


def test_tools_may_be_texts_and_nothing_of_their_schemas_is_lost(tmp_path):
    one = {"name": "add", "parameters": {"properties": {"a": {"type": "int", "enum": [1, 2]}}}}
    schema = {"type": "function", "function": one}
    given = [[schema], json.dumps([one]), [json.dumps(one)]]
    records = [{**said("Hi", "Hello"), "tools": tools} for tools in given]
    records.append({**said("Hi", "Hello"), "tools": None, "functions": [one]})
    for found in conversations(lines(tmp_path / "t.jsonl", records)):
        assert conversation_to_json(found)["tools"] == [schema]
    broken = [["add"], [None], [{"name": "add", "parameters": {"properties": {"a": 1}}}]]
    records = [{**said("Hi", "Hello"), "tools": tools} for tools in broken]
    assert problems(conversations(lines(tmp_path / "b.jsonl", records))) == [
        "b.jsonl:1: bad json ('tools': Expecting value: line 1 column 1 (char 0))",
        "b.jsonl:2: bad message ('tools': a tool needs a 'name', got None)",
        "b.jsonl:3: bad message ('tools': parameter 'a' of tool 'add' is not an object, got 1)",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_columns_that_are_null_say_nothing_in_any_kind_of_file(tmp_path, suffix):
    columns = ("messages", "conversations", "prompt", "chosen", "rejected", "responses", "label")
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    rows = [said("Hi", "Hello"), {"conversations": talk}, pair]
    rows = [dict.fromkeys(columns) | row for row in rows]
    path = tmp_path / f"r.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    found = conversations(path, preferred="best")
    assert [[m.content for m in one.messages] for one in found] == [["Hi", "Hello"]] * 3
    *others, preference = read_preferences(PreferencesConfig(str(path)))
    assert len(preference.responses) == 2
    assert all(problem.startswith("r.") for problem in problems(others))


def test_times_of_parquet_are_texts_and_lose_no_record(tmp_path):
    times = pa.array([1001, 2], pa.timestamp("ns"))
    table = pa.table({"prompt": ["a", "b"], "at": times})
    pq.write_table(table, tmp_path / "t.parquet")
    found = list(read_prompts(PromptsConfig(str(tmp_path / "t.parquet"))))
    assert [json.dumps(one.metadata) for one in found] == [
        '{"at": "1970-01-01 00:00:00.000001001"}',
        '{"at": "1970-01-01 00:00:00.000000002"}',
    ]


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    records = [said("Hi", "Hello"), said("Who?", "Me", "Why?", "So.")]
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(text))
    (tmp_path / "d.json").write_text(json.dumps(records, indent=1))
    # Rows of Parquet have every field of their column's type; those not set are null.
    told = [{**m, "content": "plain"} if m["role"] == "user" else m for m in OPENAI["messages"]]
    table = pa.Table.from_pylist([*records, {"messages": told, "tools": json.dumps(TOOLS)}])
    pq.write_table(table, tmp_path / "e.parquet")
    found = conversations(tmp_path)
    assert [f"{item.file}:{item.line}" for item in found] == [
        *(f"{name}:{line}" for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json")
          for line in (1, 2)),
        "e.parquet:1", "e.parquet:2", "e.parquet:3",
    ]  # fmt: skip
    assert {item.messages for item in found if item.line == 1} == {found[0].messages}
    assert [len(item.messages) for item in found] == [2, 4] * 5 + [5]


def test_completions_are_conversations_of_one_answer(tmp_path):
    path = lines(tmp_path / "q.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    (found,) = conversations(path, prompt_field="question", completion_field="answer")
    assert [(m.role, m.content) for m in found.messages] == [("user", "1 + 1?"), ("assistant", "2")]
    (problem,) = problems(conversations(path, form="completion"))
    assert problem.startswith("q.jsonl:1: missing field (no 'prompt'")


def test_every_problem_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    records = [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "usr", "content": "Hi"}]},
        said("Hi", " "),
        {"conversations": [{"from": "humn", "value": "Hi"}]},
        {"text": "Hi"},
        {"messages": [*said("a", "b")["messages"], {"role": "system", "content": "s"}]},
        {"messages": "Hi"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"messages": [\n"x"\n')
    with path.open("a") as file:
        file.write('{"messages": [{"role": "assistant", "content": "\\ud800"}]}\n')
    assert problems(conversations(path)) == [
        "bad.jsonl:1: no answer (no message of the assistant)",
        "bad.jsonl:2: bad message (message 1: unknown role 'usr' (did you mean 'user'?))",
        "bad.jsonl:3: empty message (message 2, the assistant's)",
        "bad.jsonl:4: bad message (message 1: unknown speaker 'humn' (did you mean 'human'?))",
        "bad.jsonl:5: unknown form (it has text; wanted are messages, conversations, prompt with"
        " completion, or responses)",
        "bad.jsonl:6: bad message (message 3: a system message stands first)",
        "bad.jsonl:7: bad message (messages are a list, got 'Hi')",
        "bad.jsonl:8: bad json (column 15: Expecting value)",
        "bad.jsonl:9: wrong type (not an object but a string)",
        "bad.jsonl:10: broken utf8 (a lone surrogate)",
    ]


def test_parts_keep_all_that_asks_the_same_together(tmp_path):
    records = [said(f"question {i // 2}", f"answer {i}") for i in range(200)]
    path = lines(tmp_path / "c.jsonl", records)
    parts = [conversations(path, part=p, held_out_fraction=0.3) for p in ("train", "held_out")]
    asked = [{item.messages[0].content for item in part} for part in parts]
    assert sum(map(len, parts)) == 200
    assert not asked[0] & asked[1]
    assert 40 <= len(parts[1]) <= 80
    assert len(conversations(path, max_records=7)) == 7


def test_prompts_keep_answers_tests_and_every_other_field(tmp_path):
    records = [
        {"prompt": "1 + 1?", "answer": 2, "tests": "assert f() == 2", "level": 3},
        {**said("Hi", "Hello", "Who?", "Me"), "source": "chat"},
        {**said("Hi", "Hello", "Who?")},
        {"question": "Why?"},
    ]
    found = list(read_prompts(PromptsConfig(lines(tmp_path / "p.jsonl", records))))
    first, second, third, problem = found
    assert (first.reference, first.tests, first.metadata) == (
        "2",
        ("assert f() == 2",),
        {"level": 3},
    )
    assert (len(second.messages), second.reference) == (3, "Me")
    assert second.metadata == {"source": "chat"}
    assert third.messages[-1].content == "Who?"
    assert third.reference is None
    assert str(problem).startswith("p.jsonl:4: missing field (no 'prompt'")


def test_an_edited_record_is_three_responses_and_three_pairs(tmp_path):
    record = {
        "prompt": "Why?",
        "responses": [{"content": "Bad", "model": "m1"}, {"content": "Good", "model": "m2"}],
        "ranking": [1, 0],
        "strength": "slightly better",
        "edited": "Best",
    }
    (found,) = preferences(tmp_path / "e.jsonl", [record])
    assert [(r.role, r.messages[0].content, r.model) for r in found.responses] == [
        ("chosen", "Good", "m2"),
        ("rejected", "Bad", "m1"),
        ("edited", "Best", ""),
    ]
    assert [(p.chosen, p.rejected, p.strength) for p in found.pairs] == [
        (1, 2, "slightly"),
        (3, 1, "better"),
        (3, 2, "significantly"),
    ]
    assert found.best.role == "edited"
    (again,) = preferences(tmp_path / "f.jsonl", [preference_to_json(found)])
    assert (again.prompt, again.responses, again.pairs) == (
        found.prompt, found.responses, found.pairs
    )  # fmt: skip
    # One such record is a target of fine-tuning, too.
    (sft,) = conversations(tmp_path / "e.jsonl")
    assert [m.content for m in sft.messages] == ["Why?", "Best"]


def test_rankings_of_several_give_every_pair(tmp_path):
    record = {"prompt": "Why?", "responses": ["c", "a", "b"], "ranking": [1, 2, 0],
              "strength": ["marginally", "better"]}  # fmt: skip
    (found,) = preferences(tmp_path / "r.jsonl", [record])
    assert [r.messages[0].content for r in found.responses] == ["a", "b", "c"]
    assert [(p.chosen, p.rejected, p.strength) for p in found.pairs] == [
        (1, 2, "marginally"),
        (1, 3, "better"),
        (2, 3, "better"),
    ]


def test_chosen_and_rejected_may_be_texts_replies_or_whole_conversations(tmp_path):
    reply = [{"role": "assistant", "content": "Good"}]
    records = [
        {"prompt": "Why?", "chosen": "Good", "rejected": "Bad", "chosen_model": "m"},
        {"prompt": [{"role": "user", "content": "Why?"}], "chosen": reply, "rejected": "Bad"},
        {"chosen": said("Why?", "Good")["messages"], "rejected": said("Why?", "Bad")["messages"]},
        {"prompt": "Why?", "chosen": said("Why?", "Good")["messages"],
         "rejected": said("Why?", "Bad")["messages"]},
    ]  # fmt: skip
    found = preferences(tmp_path / "c.jsonl", records, strength="significantly")
    assert {item.prompt for item in found} == {found[0].prompt}
    assert {tuple(r.messages[0].content for r in item.responses) for item in found} == {
        ("Good", "Bad")
    }
    assert {item.pairs[0].strength for item in found} == {"significantly"}
    assert found[0].responses[0].model == "m"


def test_responses_that_can_not_be_compared_are_refused(tmp_path):
    two = {"prompt": "Why?", "ranking": [0, 1]}
    records = [
        {"prompt": "Why?", "chosen": "Same", "rejected": " Same\n"},
        {"prompt": "Why?", "chosen": "", "rejected": "Bad"},
        {**two, "responses": ["a"]},
        {**two, "responses": ["a", "b"], "ranking": [1, 1]},
        {**two, "responses": ["a", "b"], "strength": "hugely"},
        {**two, "responses": ["a", "b"], "strength": ["better", "better"]},
        {**two, "responses": ["a", "b"], "edited": "b"},
        {"chosen": "a", "rejected": "b"},
        {"prompt": "Why?", "chosen": "a", "rejected": [{"role": "user", "content": "b"}]},
        {"chosen": said("Why?", "a")["messages"], "rejected": said("Why?", "a")["messages"]},
    ]
    assert problems(preferences(tmp_path / "p.jsonl", records)) == [
        "p.jsonl:1: identical responses (responses 1 and 2 by rank)",
        "p.jsonl:2: empty response (chosen)",
        "p.jsonl:3: bad ranking (at least two 'responses' are needed)",
        "p.jsonl:4: bad ranking ('ranking' is [1, 1]; wanted are the numbers 0 to 1, best first)",
        "p.jsonl:5: bad ranking (unknown strength 'hugely' (known: better, marginally,"
        " significantly, slightly))",
        "p.jsonl:6: bad ranking (2 strengths for the 1 steps of the ranking)",
        "p.jsonl:7: identical responses (responses 2 and edited by rank)",
        "p.jsonl:8: missing field (no 'prompt' (known: chosen, rejected))",
        "p.jsonl:9: bad message (rejected: a response has the assistant's messages, not the"
        " user's)",
        "p.jsonl:10: identical responses (chosen and rejected)",
    ]


def test_strengths_that_are_no_words_are_refused_and_empty_ones_say_nothing(tmp_path):
    two = {"prompt": "Why?", "responses": ["a", "b"], "ranking": [0, 1]}
    said = [{"level": "better"}, [["better"]], [""], 2]
    records = [{**two, "strength": strength} for strength in said]
    found = problems(preferences(tmp_path / "p.jsonl", records))
    assert [problem.split(" (known")[0] for problem in found] == [
        "p.jsonl:1: bad ranking (unknown strength {'level': 'better'}",
        "p.jsonl:2: bad ranking (unknown strength ['better'] (did you mean 'better'?))",
        "p.jsonl:3: bad ranking (unknown strength ''",
        "p.jsonl:4: bad ranking (unknown strength 2",
    ]
    (empty,) = preferences(tmp_path / "e.jsonl", [{**two, "strength": ""}], strength="slightly")
    assert empty.pairs[0].strength == "slightly"


def test_responses_are_read_in_sharegpts_form_or_named_as_unreadable(tmp_path):
    ask, good, bad = "Why?", {"from": "gpt", "value": "Good"}, {"from": "gpt", "value": "Bad"}
    other = [{"role": "user", "content": "Who?"}]
    whole = {name: said(ask, name)["messages"] for name in ("chosen", "rejected")}
    records = [
        {"prompt": ask, "chosen": good, "rejected": bad},
        {"prompt": ask, "chosen": {"contents": "Good"}, "rejected": "Bad"},
        {"prompt": other, **whole},
    ]
    first, *others = preferences(tmp_path / "p.jsonl", records)
    assert [r.messages[0].content for r in first.responses] == ["Good", "Bad"]
    assert problems(others) == [
        "p.jsonl:2: missing field (chosen has no 'content' (did you mean 'contents'?))",
        "p.jsonl:3: bad message ('prompt' is not among the messages of both responses)",
    ]


def test_a_completion_with_a_label_is_one_response(tmp_path):
    reply = [{"role": "assistant", "content": "Good"}]
    asked = [{"role": "user", "content": "Why?"}]
    records = [
        {"prompt": "Why?", "completion": "Good", "label": True, "model": "m"},
        {"prompt": asked, "completion": reply, "label": False, "tools": TOOLS},
    ]
    good, bad = preferences(tmp_path / "u.jsonl", records)
    assert [(r.role, r.messages[0].content, r.model) for r in good.responses] == [
        ("chosen", "Good", "m")
    ]
    assert (bad.responses[0].role, bad.prompt, bad.pairs) == ("rejected", good.prompt, ())
    again = preferences(tmp_path / "v.jsonl", [preference_to_json(one) for one in (good, bad)])
    for one, other in zip((good, bad), again, strict=True):
        assert (one.prompt, one.responses, one.pairs, one.tools) == (
            other.prompt, other.responses, other.pairs, other.tools
        )  # fmt: skip
    # What was labelled undesirable is no target of fine-tuning.
    sft, problem = conversations(tmp_path / "u.jsonl")
    assert [m.content for m in sft.messages] == ["Why?", "Good"]
    assert str(problem) == "u.jsonl:2: undesirable (its label is false)"
    best = conversations(tmp_path / "u.jsonl", form="preferences", preferred="best")
    assert (best[0].messages, str(best[1])) == (sft.messages, str(problem))
    table = pa.Table.from_pylist([{**records[0], "completion": reply}] * 2)
    pq.write_table(table, tmp_path / "u.parquet")
    rows = list(read_preferences(PreferencesConfig(str(tmp_path / "u.parquet"))))
    assert [row.responses for row in rows] == [good.responses] * 2


def test_single_responses_that_can_not_be_used_are_refused(tmp_path):
    one = {"prompt": "Why?", "completion": "a", "label": True}
    records = [
        {**one, "label": 1},
        {**one, "completion": " "},
        {**one, "strength": "better"},
        {"promt": "Why?", "completion": "a", "label": True},
        {**one, "completion": [{"role": "user", "content": "b"}]},
        {"prompt": "Why?", "completion": "a"},
    ]
    assert problems(preferences(tmp_path / "u.jsonl", records)) == [
        "u.jsonl:1: wrong type ('label' is a number, not true or false)",
        "u.jsonl:2: empty response (completion)",
        "u.jsonl:3: bad ranking ('strength' has no meaning for a single response)",
        "u.jsonl:4: missing field (no 'prompt' (did you mean 'promt'?))",
        "u.jsonl:5: bad message (completion: a response has the assistant's messages, not the"
        " user's)",
        "u.jsonl:6: unknown form (neither responses, nor chosen and rejected, nor completion and"
        " label (known: completion, prompt))",
    ]


def test_the_shared_data_reads_as_what_it_is(shared):
    path = shared / "data" / "gsm8k" / "train_first2500.jsonl"
    found = conversations(path, prompt_field="question", completion_field="answer", max_records=50)
    assert len(found) == 50
    assert found[0].messages[1].content.endswith("#### 72")
    prompts = read_prompts(PromptsConfig(str(path), prompt_field="question", max_records=3))
    assert [prompt.reference.split()[-1] for prompt in prompts] == ["72", "10", "5"]
