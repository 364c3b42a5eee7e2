"""A reward model learned from graded solutions: how often it ranks a right one above a wrong one.

Four models' solutions to each of 500 problems are marked right or wrong (OpenAI, 2021); every pair
of a right and a wrong one of a problem is a preference. Problems are split, so that none is in both
parts. The interval is a bootstrap over the held-out problems, whose pairs hang together.
"""

import argparse
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
from reports import Curve, Report, interval
from runs import Records, Setup, read_losses, read_records, rows_table, schedule
from scoring import bootstrap

from llama_jax.synthesis.reward_scorer import open_reward_scorer
from llama_jax.tokenizers.chat import Message

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
BATCH_SIZE = 4  # rows a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--pairs-a-problem", type=int, default=1, help="of training; the most")
    parser.add_argument("--held-out-problems", type=int, default=150)


def run(setup: Setup, arguments: argparse.Namespace, report: Report) -> None:
    """Train with each seed, rank the held-out pairs."""
    problems = read_records(arguments.gsm8k / "model_solutions_first500.jsonl", arguments.problems)
    # The last ones of the file are held out: the order is that of GSM8K's test part, which is none.
    kept = len(problems) - arguments.held_out_problems
    draw = random.Random(0)
    pairs = [
        pair
        for found in map(pairs_of, problems[:kept])
        for pair in draw.sample(found, min(len(found), arguments.pairs_a_problem))
    ]
    trained = setup.records("pairs", pairs)
    held_out = [each for each in map(pairs_of, problems[kept:]) if each]
    report.title = "A reward model from graded solutions of GSM8K"
    report.says = [(__doc__ or "").strip()]
    report.header = ("model", "held-out pairs ranked right", "mean lead of the right one")
    lengths = [[len(p["chosen"]) < len(p["rejected"]) for p in each] for each in held_out]
    shorter = [np.array(each, float) - 0.5 for each in lengths]
    add_row(report, "the shorter one", shorter, lead=False)
    curves = []
    for seed in setup.seeds:
        folder = train(setup, arguments, trained, seed)
        add_row(report, f"seed {seed}", leads_of(folder, held_out))
        curves.append(Curve(f"seed {seed}", *read_losses(folder)))
    report.figures |= {"training_pairs": len(pairs), "held_out_problems": len(held_out)}
    report.panels = [("training loss (0.693 is chance)", "step", curves)]


def pairs_of(problem: dict[str, Any]) -> Records:
    """Each right solution with each wrong one; the same text twice is one solution."""
    solutions = {problem[m]["solution"].strip(): problem[m]["is_correct"] for m in MODELS}
    right = [text for text, is_right in solutions.items() if is_right and text]
    wrong = [text for text, is_right in solutions.items() if not is_right and text]
    return [
        {"prompt": problem["question"], "chosen": good, "rejected": bad}
        for good, bad in itertools.product(right, wrong)
    ]


def train(setup: Setup, arguments: argparse.Namespace, pairs: Path, seed: int) -> Path:
    """Train once."""
    preferences = {"path": str(pairs), "truncate": "drop"}
    return setup.train(
        f"reward_{seed}",
        model=setup.model_table(head="scalar"),
        objective={"kind": "reward"},
        data=rows_table(setup, arguments, preferences=preferences),
        training={"steps": arguments.steps},
        schedule=schedule(arguments.rate, arguments.steps),
        seed=seed,
    )


def leads_of(folder: Path, held_out: list[Records]) -> list[np.ndarray]:
    """Of each problem its pairs' rewards, right less wrong."""
    scorer = open_reward_scorer(str(folder), dtype="float32", batch_size=16)
    pairs = [pair for each in held_out for pair in each]
    texts = sorted({(p["prompt"], p[kind]) for p in pairs for kind in ("chosen", "rejected")})
    scores = scorer([[Message("user", q), Message("assistant", a)] for q, a in texts])
    reward = dict(zip(texts, scores, strict=True))
    return [
        np.array([reward[p["prompt"], p["chosen"]] - reward[p["prompt"], p["rejected"]] for p in e])
        for e in held_out
    ]


def add_row(report: Report, name: str, leads: list[np.ndarray], *, lead: bool = True) -> None:
    """Accuracy with its interval over problems; a tie is half right."""
    right = [(each > 0) + (each == 0) / 2 for each in leads]

    def accuracy(picked: np.ndarray) -> float:
        return float(np.concatenate([right[i] for i in picked]).mean())

    found = accuracy(np.arange(len(right))), bootstrap(accuracy, len(right))
    mean = float(np.concatenate(leads).mean())
    report.rows.append((name, interval(*found), f"{mean:.3f}" if lead else ""))
    report.figures[name] = {"accuracy": found, "pairs": sum(map(len, leads)), "mean_lead": mean}
