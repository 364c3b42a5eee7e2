"""Patterns, functions, and sets of verifiers."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llama_jax.config.loading import ConfigError
from llama_jax.synthesis.answers import ExactAnswer
from llama_jax.synthesis.prompts import SynthesisError, make_prompts, read_prompts
from llama_jax.synthesis.verdicts import (
    Function,
    Pattern,
    Verdict,
    all_passed,
    check_verifiers,
    verify,
)

PROMPT = make_prompts([{"prompt": "say yes", "answer": "yes"}])[0]


def test_a_pattern_passes_what_it_matches_or_what_it_does_not():
    assert Pattern("y.s")(PROMPT, "y\ns").to_json() == {
        "passed": True,
        "reason": r"'y.s' matches 'y\ns'",
    }
    assert not Pattern("^no")(PROMPT, "yes, no").passed
    refusal = Pattern("as an AI", absent=True, name="no refusal")
    assert refusal(PROMPT, "yes").passed
    assert not refusal(PROMPT, "as an AI, no").passed


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"pattern: '\(': missing \)"):
        Pattern("(")


def test_a_function_gives_a_bool_or_a_verdict_of_its_own():
    short = Function(lambda prompt, response: len(response) < 3, "short")
    assert short(PROMPT, "yes") == Verdict(False, "short says no")
    own = Function(lambda prompt, response: Verdict(True, "because"), "own")
    assert verify([short, own], PROMPT, "ok") == {
        "short": Verdict(True, "short says yes"),
        "own": Verdict(True, "because"),
    }


def test_a_journal_knows_a_function_by_its_name_in_whatever_process():
    """Its address would make every later process's another verifier."""
    one, other = (Function(lambda p, r: True, "any") for _ in range(2))
    assert repr(one) == repr(other) == "Function(name='any')"


def test_all_must_pass_and_of_none_nothing_is_known():
    yes, no = Verdict(True, ""), Verdict(False, "")
    assert all_passed({"a": yes, "b": yes}) is True
    assert all_passed({"a": yes, "b": no}) is False
    assert all_passed({}) is None


def test_verifiers_are_checked_before_anything_is_made():
    with pytest.raises(SynthesisError, match="two verifiers are called 'answer'"):
        check_verifiers([ExactAnswer(), ExactAnswer()], [PROMPT])
    with pytest.raises(SynthesisError, match="prompt 1 has no 'goal'"):
        check_verifiers([ExactAnswer(field="goal")], [PROMPT])


def test_prompts_of_a_file_keep_their_other_fields(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a", "answer": 1}\n\n{"messages": [{"role": "user", "content": "b"}]}\n'
    )
    first, second = read_prompts(path, system="be brief")
    assert (first.number, dict(first.reference)) == (0, {"answer": 1})
    assert [m.role for m in first.messages] == ["system", "user"]
    assert (second.number, second.messages[1].content) == (1, "b")
    path.write_text("what?\nwhy?\n")
    assert [p.messages[0].content for p in read_prompts(path)] == ["what?", "why?"]


def test_an_object_without_a_prompt_is_no_text_that_shows_its_answer(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n{"question": "2 + 2?", "answer": "4"}\n')
    told = r"prompts\.jsonl:2: neither 'prompt' nor 'messages' \(known: answer, question\)$"
    with pytest.raises(ConfigError, match=told):
        read_prompts(path)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\r\n{"prompt": "b"}\r\n')
    first, second = read_prompts(path)
    assert (first.request.prompt, dict(first.reference)) == ("a", {"answer": 1})
    assert second.request.prompt == "b"
    path.write_bytes(b"\xef\xbb\xbfwhat?\nwhy?\n")
    assert read_prompts(path)[0].request.prompt == "what?"


def test_prompts_of_every_kind_of_file_are_the_same(tmp_path):
    asked = [{"role": "user", "content": "b"}]
    records = [{"prompt": "a", "answer": 1}, {"messages": asked, "tests": ["x", "y"]}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "p.jsonl").write_text(text)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(text.replace("\n", "\n\n").encode()))
    (tmp_path / "p.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    (tmp_path / "p.json").write_text(json.dumps(records, indent=1))
    every = dict.fromkeys(("prompt", "answer", "messages", "tests"))  # a column each, null or not
    table = pa.Table.from_pylist([{**every, **record} for record in records])
    pq.write_table(table, tmp_path / "p.parquet")
    found = {path.name: read_prompts(path) for path in sorted(tmp_path.iterdir())}
    assert set(found) == {"p.json", "p.jsonl", "p.jsonl.gz", "p.jsonl.zst", "p.parquet"}
    for prompts in found.values():
        assert prompts == found["p.jsonl"]
        assert [p.fingerprint for p in prompts] == [p.fingerprint for p in found["p.jsonl"]]


def test_prompts_that_a_file_does_not_hold_are_told_by_row(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(
        pa.Table.from_pylist([{"prompt": "a", "question": None}, {"question": "b"}]), path
    )
    told = r"p\.parquet:2: neither 'prompt' nor 'messages' \(known: question\)$"
    with pytest.raises(ConfigError, match=told):
        read_prompts(path)
    pq.write_table(pa.Table.from_pylist([{"prompt": 1}]), path)
    with pytest.raises(ConfigError, match=r"p\.parquet:1: prompt: neither a text nor messages$"):
        read_prompts(path)
    path.write_bytes(b"no Parquet")
    with pytest.raises(ConfigError, match=r"p\.parquet: unreadable file \(Parquet"):
        read_prompts(path)
    with pytest.raises(ConfigError, match=r"none\.json: No such file or directory$"):
        read_prompts(tmp_path / "none.json")


def test_two_prompts_that_ask_the_same_are_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\na\n")
    with pytest.raises(SynthesisError, match=r"prompts.txt: prompts 1 and 3 ask the same"):
        read_prompts(path)
