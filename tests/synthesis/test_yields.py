"""Expectations over subsets against all subsets written out, and the stored rewards of MATH."""

import itertools
import json

import numpy as np
import pytest

from llama_jax.synthesis import yields
from llama_jax.synthesis.yields import accuracy_of_best, best_index, best_of, pass_at, plot_yield

RANDOM = np.random.default_rng(0)
SCORES_PK = RANDOM.normal(size=(3, 5))
RIGHT_PK = RANDOM.random((3, 5)) < 0.4


def over_subsets(k, value):
    """Mean over prompts and all subsets of k samples."""
    subsets = list(itertools.combinations(range(5), k))
    return np.mean([[value(p, list(subset)) for subset in subsets] for p in range(3)])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_each_curve_is_the_mean_over_all_subsets(k):
    assert best_of(SCORES_PK)[k - 1] == pytest.approx(
        over_subsets(k, lambda p, subset: SCORES_PK[p, subset].max()), abs=1e-12
    )
    assert pass_at(RIGHT_PK)[k - 1] == pytest.approx(
        over_subsets(k, lambda p, subset: RIGHT_PK[p, subset].any()), abs=1e-12
    )

    def best_is_right(p, subset):
        return RIGHT_PK[p, subset[SCORES_PK[p, subset].argmax()]]

    assert accuracy_of_best(SCORES_PK, RIGHT_PK)[k - 1] == pytest.approx(
        over_subsets(k, best_is_right), abs=1e-12
    )


def test_known_answers():
    # One of four is right: 1 - C(3, 2) / C(4, 2) is a half.
    assert pass_at(np.array([[True, False, False, False]])) == [0.25, 0.5, 0.75, 1.0]
    assert pass_at(np.array([[False] * 3, [True] * 3])) == [0.5, 0.5, 0.5]
    assert best_of(np.array([[1.0, 3.0]])) == [2.0, 3.0]
    # Of equals the first is the best.
    assert accuracy_of_best(np.array([[1.0, 1.0]]), np.array([[True, False]])) == [0.5, 1.0]
    assert best_index([1.0, 2.0, 2.0]) == 1


def test_best_of_8_by_the_stored_rewards_of_math_samples(shared):
    lines = (shared / "data" / "math_samples" / "math_100x8.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    reward_PK = np.array([row["reward"] for row in rows])
    right_PK = np.array([row["correct"] for row in rows])
    by_reward = accuracy_of_best(reward_PK, right_PK)
    assert by_reward[0] == pytest.approx(0.91, abs=1e-12)
    assert by_reward[7] == pytest.approx(0.94, abs=1e-12)
    assert pass_at(right_PK)[7] == pytest.approx(0.96, abs=1e-12)
    curve = best_of(reward_PK)
    assert curve[0] == pytest.approx(reward_PK.mean())
    assert curve[7] == pytest.approx(reward_PK.max(axis=1).mean())
    assert curve == sorted(curve)


def test_the_curves_of_a_summary_are_drawn(tmp_path, monkeypatch):
    figures = {
        "k": 5,
        "scores": {"mean": 0.0, "best_of": best_of(SCORES_PK)},
        "right": {"pass_at": pass_at(RIGHT_PK), "best_of": accuracy_of_best(SCORES_PK, RIGHT_PK)},
    }
    path = tmp_path / "yield.png"
    assert plot_yield(figures, path, "3 prompts")
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG\r\n")
    # Other values make another picture, the same ones the same.
    plot_yield(figures, path, "3 prompts")
    assert path.read_bytes() == whole
    plot_yield({**figures, "scores": {"best_of": best_of(2 * SCORES_PK)}}, path, "3 prompts")
    assert path.read_bytes() != whole

    given = []
    monkeypatch.setattr(yields, "plot_counts", lambda panels, *rest: given.append(panels))
    plot_yield({"right": {"mean": 0.4, "pass_at": pass_at(RIGHT_PK)}}, path, "")
    plot_yield(figures, path, "")
    assert given[0] == {"share of prompts": {"right, any of K": pass_at(RIGHT_PK)}}
    assert given[1]["score"] == {"best of K": best_of(SCORES_PK)}
    assert list(given[1]["share of prompts"]) == ["right, any of K", "right, best of K"]


def test_without_scores_and_verdicts_nothing_is_drawn(tmp_path):
    assert not plot_yield({"k": 1, "prompts": 3}, tmp_path / "yield.png", "")
    assert not list(tmp_path.iterdir())
