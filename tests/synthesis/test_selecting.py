"""What is kept of samples with known scores and verdicts; MATH's stored samples through it all."""

import json

import pytest
from small_sessions import random_session
from stored_samples import MODEL, Stored, lines, write_samples

from llama_jax.config.loading import ConfigError
from llama_jax.data.preferences import to_preference
from llama_jax.data.record_files import Record
from llama_jax.inference.sampling_choice import Wishes
from llama_jax.synthesis.answers import ExactAnswer
from llama_jax.synthesis.journal import read_journal
from llama_jax.synthesis.prompts import SynthesisError, make_prompts
from llama_jax.synthesis.rejection import Drawing, rejection_sample, score_and_select
from llama_jax.synthesis.scoring import score_samples
from llama_jax.synthesis.selecting import Keeping
from llama_jax.synthesis.verdicts import Pattern


def as_read(record):
    """(chosen, rejected, strength) as the data pipeline reads it."""
    read = to_preference(Record("preferences.jsonl", 1, record), strength="marginally")
    assert {response.model for response in read.responses} == {"policy"}
    assert len(read.pairs) == 1
    return (*(response.messages[0].content for response in read.responses), record["strength"])


def select(folder, answers, *, scores=None, keeping=Keeping(), verifiers=None, reference="7"):  # noqa: B008
    prompts = make_prompts(
        [{"prompt": f"question {i}", "answer": reference} for i in range(len(answers))]
    )
    write_samples(folder, prompts, answers)
    selection = score_and_select(
        prompts,
        folder,
        open_scorer=None if scores is None else lambda: Stored(scores),
        verifiers=[ExactAnswer()] if verifiers is None else verifiers,
        keeping=keeping,
    )
    kept = [record["messages"][-1]["content"] for record in lines(folder / "conversations.jsonl")]
    pairs = [as_read(record) for record in lines(folder / "preferences.jsonl")]
    return kept, pairs, selection


def test_the_best_scored_right_answer_is_kept_and_set_against_the_worst_wrong_one(tmp_path):
    scores = {"A: 7": 1.0, "so A: 7": 2.0, "A: 8": 3.0, "A: 9": -1.0}
    kept, pairs, selection = select(tmp_path, [list(scores), list(scores)], scores=scores)
    assert kept == ["so A: 7"] * 2
    assert selection.figures["right"]["mean"] == 0.5
    assert selection.kept == selection.pairs == 2
    assert pairs == [("so A: 7", "A: 9", "significantly")] * 2


def test_without_verifiers_the_largest_score_is_kept_and_set_against_the_least(tmp_path):
    scores = {"one": 0.0, "two": 0.7, "three": 4.0, "four": 2.5}
    kept, pairs, selection = select(
        tmp_path, [["one", "three"], ["one", "two"], ["three", "four"]], scores=scores, verifiers=[]
    )
    assert kept == ["three", "two", "three"]
    # sigmoid of 4, 0.7 and 1.5 is 0.98, 0.67 and 0.82.
    assert pairs == [
        ("three", "one", "significantly"),
        ("two", "one", "slightly"),
        ("three", "four", "better"),
    ]
    assert selection.figures["scores"]["mean"] == pytest.approx((0 + 4 + 0 + 0.7 + 4 + 2.5) / 6)
    assert selection.figures["scores"]["best_of"][1] == pytest.approx((4 + 0.7 + 4) / 3)
    assert "right" not in selection.figures


def test_without_scores_the_first_right_answer_is_kept(tmp_path):
    kept, pairs, _ = select(
        tmp_path, [["A: 1", "A: 7", "A: 07", "A: 2"], ["A: 7", "7", "#### 7", "7."]]
    )
    assert kept == ["A: 7", "A: 7"]
    assert pairs == [("A: 7", "A: 2", "significantly")]


def test_answers_that_were_cut_or_are_empty_are_not_kept_unless_asked_for(tmp_path):
    rows = [["so 7~", "7"], ["7~", "7.0~"], [" ", "7"]]
    kept, _, selection = select(tmp_path / "a", rows)
    assert kept == ["7", "7"]
    assert selection.figures["truncated"] == 3
    kept, _, _ = select(tmp_path / "b", rows, keeping=Keeping(truncated=True))
    assert kept == ["so 7~", "7~", "7"]


def test_prompts_whose_best_is_below_the_least_score_are_left_out(tmp_path):
    scores = {"a": 0.5, "b": 0.1, "c": -1.0}
    rows = [["a", "b"], ["b", "c"]]
    kept, pairs, _ = select(
        tmp_path, rows, scores=scores, verifiers=[], keeping=Keeping(min_score=0.4)
    )
    assert kept == ["a"]
    assert [pair[:2] for pair in pairs] == [("a", "b"), ("b", "c")]


def test_answers_that_say_the_same_or_score_the_same_make_no_pair(tmp_path):
    scores = {"a": 1.0, "a ": 0.0, "b": 1.0}
    rows = [["a", "a "], ["a", "b"]]
    _, pairs, _ = select(tmp_path, rows, scores=scores, verifiers=[])
    assert pairs == []


def test_a_right_answer_stands_over_a_better_scored_wrong_one(tmp_path):
    scores = {"A: 7": 0.0, "A: 8": 5.0}
    keeping = Keeping(pairs="best_worst")
    _, pairs, _ = select(tmp_path, [["A: 8", "A: 7"]], scores=scores, keeping=keeping)
    assert pairs == [("A: 7", "A: 8", "significantly")]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"verifiers": []}, "2 samples of a prompt, but no reward model and no verifier"),
        ({"keeping": Keeping(pairs="best_worst")}, "pairs: 'best_worst' needs a reward model"),
        ({"keeping": Keeping(min_score=1.0)}, "min_score: nothing was scored"),
        (
            {"verifiers": [], "scores": {"a": 0, "b": 1}, "keeping": Keeping(pairs="right_wrong")},
            "pairs: 'right_wrong' needs a verifier",
        ),
    ],
)
def test_a_rule_that_nothing_was_made_for_is_refused(tmp_path, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        select(tmp_path, [["a", "b"]], **options)


def test_records_say_where_they_come_from(tmp_path):
    scores = {"A: 7": 1.0, "A: 8": 3.0}
    select(tmp_path, [["A: 8", "A: 7"]], scores=scores)
    (record,) = lines(tmp_path / "conversations.jsonl")
    assert record["messages"][0] == {"role": "user", "content": "question 0"}
    assert record["provenance"] == {
        "prompt": 0,
        "model": MODEL,
        "sampling": {"seed": 0},
        "k": 2,
        "kept": 1,
        "scores": [3.0, 1.0],
        "verdicts": [
            {"answer": {"passed": False, "reason": "8 is not 7"}},
            {"answer": {"passed": True, "reason": "7 is 7"}},
        ],
    }


def test_scores_that_are_no_numbers_are_refused_and_scoring_goes_on_where_it_ended(tmp_path):
    prompts = make_prompts([{"prompt": "a"}, {"prompt": "b"}])
    write_samples(tmp_path, prompts, [["x", "y"], ["x", "z"]])
    path = tmp_path / "scores.jsonl"
    samples = tmp_path / "samples.jsonl"
    with pytest.raises(SynthesisError, match="scorer stored gave nan for sample 2 of prompt 2"):
        score_samples(samples, prompts, path, scorer=Stored({"x": 1, "y": 2, "z": float("nan")}))
    assert [record["scores"] for record in read_journal(path)[1]] == [[1.0, 2.0]]
    score_samples(samples, prompts, path, scorer=Stored({"x": 1, "z": 5}))
    assert [record["scores"] for record in read_journal(path)[1]] == [[1.0, 2.0], [1.0, 5.0]]
    with pytest.raises(SynthesisError, match="begun with another verifiers"):
        score_samples(samples, prompts, path, scorer=Stored({}), verifiers=[Pattern("x")])


def test_verdicts_by_references_that_have_changed_are_not_gone_on_with(tmp_path):
    assert select(tmp_path, [["A: 7", "A: 8"]])[0] == ["A: 7"]
    corrected = make_prompts([{"prompt": "question 0", "answer": "8"}])
    with pytest.raises(SynthesisError, match=r"scores\.jsonl: was begun with another references"):
        score_and_select(corrected, tmp_path, verifiers=[ExactAnswer()])
    (tmp_path / "scores.jsonl").unlink()
    score_and_select(corrected, tmp_path, verifiers=[ExactAnswer()])
    (kept,) = lines(tmp_path / "conversations.jsonl")
    assert kept["messages"][-1]["content"] == "A: 8"


def test_samples_that_are_not_whole_or_of_other_prompts_are_refused(tmp_path):
    prompts = make_prompts([{"prompt": "a"}, {"prompt": "b"}])
    write_samples(tmp_path, prompts, [["x"], ["y"]])
    path = tmp_path / "samples.jsonl"
    with pytest.raises(SynthesisError, match="was made of other prompts than these 1"):
        score_and_select(prompts[:1], tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(SynthesisError, match="has 1 of 2 prompts; its making has not ended"):
        score_and_select(prompts, tmp_path)


def test_math_samples_by_their_stored_rewards_and_by_a_verifier(tmp_path, shared):
    text = (shared / "data" / "math_samples" / "math_100x8.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    prompts = make_prompts([{"prompt": r["question"], "answer": r["answer"]} for r in rows])
    # The sample's number after its answer tells equal ones apart for the lookup.
    answers = [
        [f"{k}. \\boxed{{{text}}} ({p})" for k, text in enumerate(row["predictions"])]
        for p, row in enumerate(rows)
    ]
    scores = {
        text: score
        for texts, row in zip(answers, rows, strict=True)
        for text, score in zip(texts, row["reward"], strict=True)
    }
    write_samples(tmp_path, prompts, answers)
    selection = score_and_select(
        prompts, tmp_path, open_scorer=lambda: Stored(scores), verifiers=[ExactAnswer()]
    )
    right = selection.figures["right"]
    assert right["mean"] == pytest.approx(0.91, abs=1e-12)
    assert right["best_of"][7] == pytest.approx(0.94, abs=1e-12)
    assert right["pass_at"][7] == pytest.approx(0.96, abs=1e-12)
    # What a verifier picks is the oracle; the 10 problems whose samples disagree make pairs.
    assert (selection.kept, selection.pairs) == (96, 10)


def test_a_folder_is_filled_once_and_the_second_time_nothing_changes(tmp_path):
    prompts = make_prompts([{"prompt": word} for word in ("ab", "cd", "ef")])
    drawing = Drawing(k=2, wishes=Wishes(temperature=1.0), max_new_tokens=5)
    keeping = Keeping(truncated=True)

    class Length:
        name = "length"

        def __call__(self, conversations):
            return [len(conversation[-1].content) for conversation in conversations]

    def fill():
        rejection_sample(
            random_session(), prompts, tmp_path, drawing, open_scorer=Length, keeping=keeping
        )
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    first = fill()
    assert set(first) == {
        *("samples.jsonl", "scores.jsonl", "conversations.jsonl", "preferences.jsonl"),
        *("summary.json", "yield.png"),
    }
    assert first["yield.png"].startswith(b"\x89PNG\r\n")
    assert fill() == first
    assert json.loads(first["summary.json"])["samples"] == 6
