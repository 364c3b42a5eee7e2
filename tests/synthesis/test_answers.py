"""Final answers: typed-out cases, and every graded solution of GSM8K and MATH that is at hand."""

import json

import pytest

from llama_jax.synthesis.answers import (
    ExactAnswer,
    final_answer,
    normalised,
    number_of,
    same_answer,
)
from llama_jax.synthesis.prompts import SynthesisError, make_prompts

SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 9.\n#### 18", "18"),
        ("9 * 2 = <<9*2=18>>18\nA: 18", "18"),
        ("**Answer:** 12 and more", "12 and more"),
        ("So the answer is 3.5. Great.", "3.5"),
        ("Thus the answer is: -2", "-2"),
        (r"we get $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1}, no, \boxed{2}", "2"),
        ("#### 5\nwait\n#### 6", "6"),
        (r"#### 5 or \boxed{7}", "7"),
        ("it costs $1,234.50.", "$1,234.50"),
        ("so 16 - 3 = 13 eggs", "13"),
        ("x is -5", "-5"),
        ("from 7-3", "3"),
        ("it is (-4)", "-4"),
        ("about 3/4 of it", "3/4"),
        ("about 2 1/2 of it", "2 1/2"),
        ("The answer is:\n\n18", "18"),
        ("none at all", None),
        ("####\n", None),
        (r"\boxed{12", "12"),
    ],
)
def test_the_answer_is_found_by_its_mark_and_else_is_the_last_number(text, answer):
    assert final_answer(text) == answer


def test_only_the_forms_asked_for_count():
    assert final_answer("The answer is 3", ("hashes",)) is None
    assert final_answer("The answer is 3\n7 more", ("number",)) == "7"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("18", "18.00", True),
        ("$1,234", "1234", True),
        ("50%", "50", True),
        ("0.5", "1/2", True),
        (r"\dfrac{1}{2}", "0.5", True),
        (r"-\frac12", "-0.50", True),
        ("−3", "-3", True),
        ("2 1/2", "2.5", True),
        ("2 1/2", "10.5", False),
        (r"-2\frac{1}{2}", "-2.5", True),
        (r"2\frac12", "21/2", False),
        ("18 dollars", "18", True),
        ("$18 per day.", "18", True),
        (r"18\text{ cm}", "18.0", True),
        ("**18** apples", "18", True),
        ("18 apples", "18 pears", False),
        ("18 million", "18", False),
        ("18 x", "18", False),
        ("18 or 19", "18", False),
        ("not 18", "18", False),
        (r"\text{east}", "east", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("1,2", "12", False),
        ("10,20,30", "102030", False),
        ("0.333", "1/3", False),
        ("", "", False),
        ("18", "19", False),
        (r"\frac{a+b}{2}", "(a+b)/2", True),
        # Reading this as a number would take a gigabyte; by its letters it is something else.
        ("1e999999999", "1e999999998", False),
        ("9" * 100_000, "9" * 100_000, True),
        ("1/0", "1/0", True),
    ],
)
def test_answers_are_the_same_as_numbers_or_by_their_letters(one, other, same):
    assert same_answer(one, other) is same
    assert same_answer(other, one) is same


def test_every_reference_answer_of_gsm8k_is_read_as_a_number(shared):
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()
    answers = [final_answer(json.loads(line)["answer"]) for line in lines]
    assert len(answers) == 1319
    assert all(answer is not None and number_of(normalised(answer)) for answer in answers)


def test_verdicts_are_those_of_the_2000_graded_solutions(shared):
    lines = (shared / "data" / "gsm8k" / "model_solutions_first500.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    entries = [{"prompt": r["question"], "answer": r["ground_truth"]} for r in rows]
    verifier, right = ExactAnswer(), dict.fromkeys(SOLVERS, 0)
    for prompt, row in zip(make_prompts(entries), rows, strict=True):
        for solver in SOLVERS:
            verdict = verifier(prompt, row[solver]["solution"])
            assert verdict.passed is row[solver]["is_correct"], (prompt.number, solver, verdict)
            right[solver] += verdict.passed
    assert [round(100 * right[solver] / 500) for solver in SOLVERS] == [21, 40, 35, 56]


def test_verdicts_are_those_of_the_800_graded_answers_to_competition_problems(shared):
    lines = (shared / "data" / "math_samples" / "math_100x8.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    agree = [
        same_answer(given, row["answer"]) == right
        for row in rows
        for given, right in zip(row["predictions"], row["correct"], strict=True)
    ]
    assert (sum(agree), len(agree)) == (800, 800)


def test_the_reason_says_both_answers():
    (prompt,) = make_prompts([{"prompt": "6 * 3?", "answer": "so\n#### 18"}])
    assert ExactAnswer()(prompt, "A: 18.0").reason == "18.0 is 18"
    wrong = ExactAnswer()(prompt, "A: 17")
    assert (wrong.passed, wrong.reason) == (False, "17 is not 18")
    assert ExactAnswer()(prompt, "hm").reason == "no final answer in it"


def test_a_prompt_without_the_field_is_refused_with_the_nearest_name():
    prompts = make_prompts([{"prompt": "a", "answers": 1}, {"prompt": "b", "answer": [1]}])
    with pytest.raises(SynthesisError, match=r"prompt 1 has no 'answer'.*did you mean 'answers'"):
        ExactAnswer().check(prompts[0])
    with pytest.raises(SynthesisError, match=r"prompt 2: 'answer' is neither a text nor a number"):
        ExactAnswer().check(prompts[1])


def test_a_prompt_whose_answer_is_empty_is_refused():
    (prompt,) = make_prompts([{"prompt": "2 + 2?", "answer": " "}])
    with pytest.raises(SynthesisError, match="prompt 1: 'answer' is empty"):
        ExactAnswer().check(prompt)
