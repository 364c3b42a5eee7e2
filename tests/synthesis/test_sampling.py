"""Samples in a journal: what each depends on, and kills at every byte."""

import json
import multiprocessing
import random

import pytest
from small_sessions import random_session, scripted_session

from llama_jax.config.loading import ConfigError
from llama_jax.inference.generating import make_task
from llama_jax.inference.sampling_choice import Wishes
from llama_jax.synthesis.journal import Journal, read_journal
from llama_jax.synthesis.prompts import SynthesisError, make_prompts
from llama_jax.synthesis.sampling import sample_prompts

WISHES = Wishes(temperature=1.0, seed=3)
PROMPTS = make_prompts([{"prompt": f"{word}: ", "answer": i} for i, word in enumerate("abcde")])
NEW_TOKENS = 6


def sample(path, prompts=PROMPTS, *, k=3, wishes=WISHES, session=None, **options):
    session = session or random_session()
    sample_prompts(session, prompts, path, k=k, wishes=wishes, max_new_tokens=NEW_TOKENS, **options)
    return path.read_bytes()


def texts(path):
    return [[r["text"] for r in record["responses"]] for record in read_journal(path)[1]]


def plain(prompts, *, n, wishes=WISHES):
    requests = [prompt.request for prompt in prompts]
    task = make_task(random_session(), requests, wishes, max_new_tokens=NEW_TOKENS)
    found = [answer.completion.text for answer in task.answers(n=n, batch_size=4)]
    return [found[start : start + n] for start in range(0, len(found), n)]


def test_one_sample_of_each_prompt_is_plain_sampling(tmp_path):
    sample(tmp_path / "a.jsonl", k=1)
    assert texts(tmp_path / "a.jsonl") == plain(PROMPTS, n=1)


def test_a_sample_depends_on_seed_prompt_and_number_alone(tmp_path):
    sample(tmp_path / "a.jsonl")
    three = texts(tmp_path / "a.jsonl")
    assert len({text for row in three for text in row}) == 15
    backwards = make_prompts([{"prompt": p.request.prompt} for p in PROMPTS[::-1]])
    sample(tmp_path / "b.jsonl", backwards, k=2, batch_size=2)
    assert texts(tmp_path / "b.jsonl") == [row[:2] for row in three[::-1]]
    sample(tmp_path / "c.jsonl", wishes=Wishes(temperature=1.0, seed=4))
    assert all(a != b for a, b in zip(texts(tmp_path / "c.jsonl"), three, strict=True))


def test_a_line_has_what_was_asked_what_came_and_how(tmp_path):
    sample(tmp_path / "a.jsonl")
    header, records = read_journal(tmp_path / "a.jsonl")
    assert (header["kind"], header["k"], header["sampling"]["seed"]) == ("samples", 3, 3)
    assert header["sampling"]["temperature"] == 1.0
    assert len(header["model"]["fingerprint"]) == 16
    first = records[1]
    assert (first["prompt"], first["reference"]) == (1, {"answer": 1})
    assert first["messages"] == [{"role": "user", "content": "b: "}]
    response = first["responses"][0]
    assert response["message"] == {"role": "assistant", "content": response["text"]}
    assert (response["finish_reason"], response["tokens"]) == ("length", 6)


def test_a_conversation_is_replied_to_in_its_chat_format(tmp_path):
    session = scripted_session(["\n", "OK", "<|eot_id|>"])
    prompts = make_prompts([{"prompt": "Well"}])
    sample(tmp_path / "a.jsonl", prompts, k=1, session=session, wishes=Wishes(temperature=0.0))
    response = read_journal(tmp_path / "a.jsonl")[1][0]["responses"][0]
    assert response == {
        "text": "OK",
        "message": {"role": "assistant", "content": "OK"},
        "finish_reason": "stop",
        "stop": "<|eot_id|>",
        "tokens": 2,
    }


def test_killed_after_any_byte_it_ends_with_the_same_file(tmp_path):
    whole = sample(tmp_path / "whole.jsonl")
    lines = [0]
    for line in whole.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    chance = random.Random(0)
    cuts = {*lines, *(place + 1 for place in lines[:-1]), *(p - 1 for p in lines[1:])}
    cuts |= {chance.randrange(len(whole)) for _ in range(5)}
    for cut in sorted(cuts):
        path = tmp_path / f"cut{cut}.jsonl"
        path.write_bytes(whole[:cut])
        assert sample(path) == whole


def test_only_what_is_missing_is_made_again(tmp_path):
    whole = sample(tmp_path / "a.jsonl")
    lines = whole.splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:10])
    told = []
    sample(tmp_path / "b.jsonl", progress=lambda done, total: told.append((done, total)))
    assert told == [(3, 5), (4, 5), (5, 5)]
    sample(tmp_path / "b.jsonl", progress=lambda *_: pytest.fail("all was there"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"k": 2}, r"was begun with another k \(3, now 2\)"),
        ({"wishes": Wishes(temperature=0.5, seed=3)}, r"another sampling.temperature \(1.0, now"),
        ({"prompts": PROMPTS[:2]}, r"was begun with another prompts"),
        ({"session": 1}, r"was begun with another model.fingerprint"),
    ],
)
def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path, options, complaint):
    sample(tmp_path / "a.jsonl")
    if "session" in options:
        options = {"session": random_session(1)}
    with pytest.raises(SynthesisError, match=complaint):
        sample(tmp_path / "a.jsonl", **options)


def test_numbers_that_make_no_sense_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="k: 0 samples of a prompt; at least 1"):
        sample(tmp_path / "a.jsonl", k=0)
    with pytest.raises(ConfigError, match="temperature: 3 samples would all be the same at 0"):
        sample(tmp_path / "a.jsonl", wishes=Wishes(temperature=0.0))
    assert not (tmp_path / "a.jsonl").exists()


def test_a_line_that_is_no_record_is_told_by_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind": "x"}\n{"prompt": 0}\n{"pro\n')
    with pytest.raises(SynthesisError, match=r"a.jsonl:3: not a whole JSON object"):
        Journal(path, {"kind": "x"})
    path.write_text('{"kind": "x"}\n{"prompt": 0}\n{"prompt": 0}\n')
    with pytest.raises(SynthesisError, match=r"a.jsonl:3: not a record of its own prompt"):
        read_journal(path)


def _open(path):
    try:
        Journal(path, {})
    except SynthesisError as error:
        return str(error)
    return None


def test_two_processes_do_not_write_one_journal(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, {}) as journal, multiprocessing.get_context("spawn").Pool(1) as pool:
        journal.append({"prompt": 0, "text": "é\ud800"})
        with pytest.raises(SynthesisError, match="prompt 0 is there already"):
            journal.append({"prompt": 0})
        assert pool.apply(_open, (path,)) == f"{path}: another process is writing to it"
    assert (
        json.loads(path.read_bytes().splitlines()[1].decode("utf-8", "surrogatepass"))["prompt"]
        == 0
    )
