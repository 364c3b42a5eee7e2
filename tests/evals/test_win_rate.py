"""Win rates: the known interval, sides, and judges by score and by passing."""

import pytest

from llama_jax.evals.win_rate import (
    Decision,
    Match,
    PassJudge,
    ScoreJudge,
    WinRate,
    first_rate,
    judge_matches,
    wilson_interval,
)
from llama_jax.tokenizers.chat import Message

ASKED = (Message("user", "which?"),)


def matches(pairs):
    return [
        Match(i, ASKED, Message("assistant", a), Message("assistant", b))
        for i, (a, b) in enumerate(pairs)
    ]


def length(conversations):
    return [len(conversation[-1].content) for conversation in conversations]


def test_55_wins_and_10_ties_of_100_are_060_from_0502_to_0691():
    rate = WinRate(wins=55, ties=10, losses=35)
    low, high = rate.interval()
    assert rate.rate == 0.6
    assert (round(low, 3), round(high, 3)) == (0.502, 0.691)
    assert str(rate) == "0.600 (0.502 to 0.691): 55 wins, 10 ties, 35 losses"
    assert rate.to_json()["matches"] == 100


def test_wilson_stays_within_0_and_1_and_narrows_with_trials():
    # By hand: z^2 = 3.8415, of 0 of 10 the upper bound is z^2 / (10 + z^2).
    low, high = wilson_interval(0, 10)
    assert (low, round(high, 4)) == (0.0, round(3.8415 / 13.8415, 4))
    assert wilson_interval(10, 10) == (pytest.approx(1 - 3.8415 / 13.8415, abs=1e-4), 1.0)
    widths = [hi - lo for lo, hi in (wilson_interval(n // 2, n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
    assert wilson_interval(5, 10, 0.9)[0] > wilson_interval(5, 10)[0]
    for successes, trials in ((1, 0), (11, 10), (-1, 10)):
        with pytest.raises(ValueError, match="successes of"):
            wilson_interval(successes, trials)


def test_the_better_scored_answer_wins_wherever_it_stands():
    rate, decisions = judge_matches(
        matches([("aaa", "b")] * 30 + [("a", "bbb")] * 20 + [("a", "b")] * 10),
        ScoreJudge(length, "length"),
    )
    assert rate == WinRate(wins=30, ties=10, losses=20)
    firsts = [decision.first for decision in decisions]
    assert 20 < firsts.count("a") < 40


def test_scores_closer_than_the_margin_tie():
    pairs = matches([("aaa", "b"), ("aa", "b")])
    rate, _ = judge_matches(pairs, ScoreJudge(length, "length", margin=1.5))
    assert rate == WinRate(1, 1, 0)


def test_a_judge_that_likes_the_first_gives_neither_an_advantage_and_is_found_out():
    class First:
        name = "first"

        def __call__(self, match, first, second):
            return "first"

    rate, decisions = judge_matches(matches([("a", "b")] * 1000), First())
    low, high = rate.interval()
    assert low < 0.5 < high
    assert first_rate(decisions) == 1.0


def test_sides_depend_on_seed_and_number_alone():
    pairs = matches([("a", "b")] * 50)
    judge = ScoreJudge(length, "length")
    firsts = [d.first for d in judge_matches(pairs, judge)[1]]
    assert [d.first for d in judge_matches(pairs[::-1], judge)[1]] == firsts[::-1]
    assert [d.first for d in judge_matches(pairs, judge, seed=1)[1]] != firsts


def test_by_passing_only_one_right_answer_decides():
    judge = PassJudge(lambda number, answer: answer.content == str(number), "equal")
    pairs = matches([("0", "9"), ("9", "1"), ("2", "2"), ("9", "9")])
    rate, decisions = judge_matches(pairs, judge)
    assert rate == WinRate(1, 2, 1)
    assert [decision.winner for decision in decisions] == ["a", "b", "tie", "tie"]


def test_ties_count_half_for_whoever_is_first():
    decisions = [Decision(0, "a", "tie"), Decision(1, "a", "a"), Decision(2, "b", "a")]
    assert first_rate(decisions) == 0.5


def test_no_matches_is_an_error():
    with pytest.raises(ValueError, match="no matches"):
        judge_matches([], ScoreJudge(length, "length"))
