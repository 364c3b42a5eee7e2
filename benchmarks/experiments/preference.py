"""Rejection sampling with a verifier, then fine-tuning on what passed, then DPO on the pairs.

Sums of two numbers: the model answers each K times, a verifier says which answers are right. The
best one of each prompt is fine-tuned on; DPO then learns from pairs of a right and a wrong one. On
prompts that were held out: greedy exact match, how often a right sampled answer is likelier than a
wrong one, by how much (nats of the whole answer), how often training widened that (what DPO calls
accuracy: rewards over the model that the stage began with), and the right ones' log-probability.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reports import Curve, Report, interval
from runs import (
    Records,
    Setup,
    read_losses,
    read_records,
    read_verdicts,
    rows_table,
    schedule,
    tokenizer_table,
)
from scoring import answer_logps, bootstrap

from llama_jax.evals.win_rate import wilson_interval

BATCH_SIZE = 2  # rows a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--held-out-prompts", type=int, default=64)
    parser.add_argument("--largest", type=int, default=30, help="number of a sum")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--sft-steps", type=int, default=16)
    parser.add_argument("--sft-rate", type=float, default=3e-5)
    parser.add_argument("--dpo-steps", type=int, default=24)
    parser.add_argument("--dpo-rate", type=float, default=1e-5)


def run(setup: Setup, arguments: argparse.Namespace, report: Report) -> None:
    """Sample once, train with each seed, score all."""
    problems = sums(arguments.prompts + arguments.held_out_prompts, arguments.largest)
    trained = setup.records("prompts", problems[: arguments.prompts])
    held_out = setup.records("held_out_prompts", problems[arguments.prompts :])
    draw = {
        "temperature": arguments.temperature,
        "max_new_tokens": arguments.answer_tokens,
        "batch_size": 32,
    }
    samples = setup.sample("samples", setup.checkpoint, trained, arguments.k, draw)
    apart = setup.sample("held_out_samples", setup.checkpoint, held_out, arguments.k, draw)
    pairs = [as_texts(record) for record in read_records(apart / "preferences.jsonl")]
    if not pairs:
        raise SystemExit("no held-out prompt has a right and a wrong answer; take more of them")
    greedy = draw | {"temperature": 0.0}
    report.title = "Rejection sampling, fine-tuning and DPO on verified sums"
    report.says = [(__doc__ or "").strip(), yield_of(samples, len(pairs))]
    report.header = (
        *("model", "exact match, greedy", "right likelier than wrong", "margin, nats"),
        *("wider than before the stage", "log-probability of the right"),
    )
    held_out_data = (held_out, pairs, greedy)
    before = score(setup, report, "before", setup.checkpoint, *held_out_data)
    curves: list[list[Curve]] = [[], []]
    for seed in setup.seeds:
        sft = train_sft(setup, arguments, samples, seed)
        name = f"fine-tuned, seed {seed}"
        tuned = score(setup, report, name, str(sft), *held_out_data, begun=before)
        dpo = train_dpo(setup, arguments, samples, sft, seed)
        score(setup, report, f"and DPO, seed {seed}", str(dpo), *held_out_data, begun=tuned)
        for kind, folder in enumerate((sft, dpo)):
            curves[kind].append(Curve(f"seed {seed}", *read_losses(folder)))
    report.panels = [
        ("fine-tuning, training loss", "step", curves[0]),
        ("DPO, training loss (with 0.2 NLL)", "step", curves[1]),
    ]


def sums(count: int, largest: int) -> Records:
    """Distinct questions, the same always."""
    numbers = range(1, largest + 1)
    found = [(f"{a} + {b}", a + b) for a in numbers for b in numbers]
    found += [(f"{a} - {b}", a - b) for a in numbers for b in numbers if a >= b]
    if count > len(found):
        raise SystemExit(f"--largest {largest} gives {len(found)} sums, {count} are needed")
    return [
        {"prompt": f"What is {asked}? Reply with the number only.", "answer": str(answer)}
        for asked, answer in random.Random(0).sample(found, count)
    ]


def train_sft(setup: Setup, arguments: argparse.Namespace, samples: Path, seed: int) -> Path:
    """On the answers that were kept."""
    return setup.train(
        f"sft_{seed}",
        data=rows_table(
            setup, arguments, conversations={"path": str(samples / "conversations.jsonl")}
        ),
        training={"steps": arguments.sft_steps},
        schedule=schedule(arguments.sft_rate, arguments.sft_steps),
        seed=seed,
    )


def train_dpo(
    setup: Setup, arguments: argparse.Namespace, samples: Path, start: Path, seed: int
) -> Path:
    """With Llama 3's defaults, from the fine-tuned model."""
    return setup.train(
        f"dpo_{seed}",
        init={"path": str(start)},
        tokenizer=tokenizer_table(start),
        objective={"kind": "dpo"},
        data=rows_table(setup, arguments, preferences={"path": str(samples / "preferences.jsonl")}),
        training={"steps": arguments.dpo_steps},
        schedule=schedule(arguments.dpo_rate, arguments.dpo_steps),
        seed=seed,
    )


def as_texts(record: dict[str, Any]) -> tuple[str, str, str]:
    """Question, right and wrong answer of a pair that sampling kept."""
    asked = record["prompt"]
    question = asked if isinstance(asked, str) else asked[-1]["content"]
    best, worst = (record["responses"][place]["content"] for place in record["ranking"][:2])
    return question, best, worst


def yield_of(samples: Path, held_out_pairs: int) -> str:
    """What sampling gave, in a sentence."""
    verdicts = read_verdicts(samples)
    right, some = np.mean(verdicts), np.mean([any(each) for each in verdicts])
    return (
        f"{len(verdicts)} prompts, {len(verdicts[0])} answers each: {right:.1%} of answers are "
        f"right, {some:.1%} of prompts have a right one; "
        f"{held_out_pairs} pairs of held-out prompts."
    )


def score(
    setup: Setup,
    report: Report,
    name: str,
    model: str,
    prompts: Path,
    pairs: list[tuple[str, str, str]],
    draw: dict[str, Any],
    *,
    begun: np.ndarray | None = None,
) -> np.ndarray:
    """A row of the table; each pair's lead, and `begun` those of the model that it began as."""
    folder = "greedy_" + name.replace(",", "").replace(" ", "_")
    right = [each[0] for each in read_verdicts(setup.sample(folder, model, prompts, 1, draw))]
    chosen = answer_logps(model, [(asked, good) for asked, good, _ in pairs]).logps
    rejected = answer_logps(model, [(asked, bad) for asked, _, bad in pairs]).logps
    leads = chosen - rejected
    figures = {
        "exact_match": _share(right),
        "accuracy": _share(leads > 0),
        "margin": _mean(leads),
        "widened": None if begun is None else _share(leads > begun),
        "chosen_logp": _mean(chosen),
    }
    report.figures[name] = figures
    report.rows.append((name, *(interval(*each) if each else "" for each in figures.values())))
    return leads


def _share(passed: Sequence[bool] | np.ndarray) -> tuple[float, tuple[float, float]]:
    count = int(np.sum(passed))
    return count / len(passed), wilson_interval(count, len(passed))


def _mean(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    return float(values.mean()), bootstrap(lambda picked: values[picked].mean(), len(values))
