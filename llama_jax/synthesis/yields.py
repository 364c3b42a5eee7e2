"""What K samples bring: rewards and right answers by K, each estimated from all samples there are.

From K samples of a prompt the expectation over k of them, drawn without replacement, is exact; a
curve so estimated has no noise of the choice of subsets (pass@k so in arXiv 2107.03374, eq. 1).
P prompts, K samples of each.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.metrics.plots import plot_counts


def best_of(scores_PK: np.ndarray) -> list[float]:
    """For k = 1 to K: the expected largest score of k samples, meaned over prompts."""
    ordered_PK = np.sort(np.asarray(scores_PK, np.float64), axis=1)[:, ::-1]
    return [
        float((ordered_PK @ _best_shares(ordered_PK.shape[1], k)).mean()) for k in _ks(ordered_PK)
    ]


def pass_at(right_PK: np.ndarray) -> list[float]:
    """For k = 1 to K: the chance that one of k samples is right, meaned over prompts."""
    right_PK = np.asarray(right_PK, bool)
    K = right_PK.shape[1]
    counts = right_PK.sum(axis=1)
    return [
        float(np.mean([1 - math.comb(K - int(c), k) / math.comb(K, k) for c in counts]))
        for k in _ks(right_PK)
    ]


def accuracy_of_best(scores_PK: np.ndarray, right_PK: np.ndarray) -> list[float]:
    """For k = 1 to K: the chance that the best-scored of k samples is right, meaned over prompts.

    Of equal scores the first sample counts as the best.
    """
    scores_PK, right_PK = np.asarray(scores_PK, np.float64), np.asarray(right_PK, bool)
    order_PK = np.argsort(-scores_PK, axis=1, kind="stable")
    ordered_PK = np.take_along_axis(right_PK, order_PK, axis=1).astype(np.float64)
    return [
        float((ordered_PK @ _best_shares(ordered_PK.shape[1], k)).mean()) for k in _ks(ordered_PK)
    ]


def best_index(scores: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def plot_yield(figures: Mapping[str, Any], path: Path, title: str) -> bool:
    """Draw a summary's curves by K into a PNG file; whether there were any."""
    scores, right = figures.get("scores", {}), figures.get("right", {})
    panels = {
        "score": {"best of K": scores.get("best_of")},
        "share of prompts": {
            "right, any of K": right.get("pass_at"),
            "right, best of K": right.get("best_of"),
        },
    }
    there = {name: {k: v for k, v in curves.items() if v} for name, curves in panels.items()}
    panels = {name: curves for name, curves in there.items() if curves}
    return plot_counts(panels, path, title, "K, samples of a prompt")


def _ks(values_PK: np.ndarray) -> range:
    return range(1, values_PK.shape[1] + 1)


def _best_shares(K: int, k: int) -> np.ndarray:
    """[K]: the chance that the j-th best of K is the best of k drawn from them."""
    return np.array([math.comb(K - 1 - j, k - 1) / math.comb(K, k) for j in range(K)])
