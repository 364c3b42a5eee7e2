"""Supervised fine-tuning on GSM8K's training problems: held-out answer loss and exact match.

The loss is that of the reference solutions to test problems; exact match is whether the final
number of a greedy answer is right. Before, and after training with each seed.
"""

import argparse
from pathlib import Path
from typing import Any

from reports import Curve, Report, interval
from runs import Setup, read_losses, read_records, read_verdicts, rows_table, schedule
from scoring import AnswerLogps, answer_logps

from llama_jax.evals.win_rate import wilson_interval

BATCH_SIZE = 4  # rows a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rate", type=float, default=3e-5)
    parser.add_argument("--train-problems", type=int, default=1000)
    parser.add_argument("--test-problems", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=160)


def run(setup: Setup, arguments: argparse.Namespace, report: Report) -> None:
    """Train with each seed, score all."""
    tested = read_records(arguments.gsm8k / "test.jsonl", arguments.test_problems)
    prompts = setup.records(
        "test_prompts", ({"prompt": r["question"], "answer": r["answer"]} for r in tested)
    )
    models = {"before": setup.checkpoint}
    for seed in setup.seeds:
        models[f"seed {seed}"] = str(train(setup, arguments, seed))
    draw = {"temperature": 0.0, "max_new_tokens": arguments.answer_tokens, "batch_size": 32}
    report.title = "Supervised fine-tuning on GSM8K"
    report.says = [(__doc__ or "").strip()]
    report.header = ("model", "held-out loss, nats a token", "below before", "exact match")
    before: AnswerLogps | None = None
    for name, path in models.items():
        scored = answer_logps(path, [(r["question"], r["answer"]) for r in tested])
        before = before or scored
        sampled = setup.sample(f"answers_{name.replace(' ', '_')}", path, prompts, 1, draw)
        right = [each[0] for each in read_verdicts(sampled)]
        gain = before.loss - scored.loss, before.loss_interval(scored)
        match = sum(right) / len(right), wilson_interval(sum(right), len(right))
        report.rows.append(
            (name, interval(scored.loss, scored.loss_interval()), interval(*gain), interval(*match))
        )
        report.figures[name] = {
            "loss": scored.loss,
            "loss_interval": scored.loss_interval(),
            "below_before": gain,
            "exact_match": match,
            "right": sum(right),
            "of": len(right),
        }
    curves = [Curve(n, *read_losses(Path(models[n]))) for n in models if n != "before"]
    report.panels = [("training loss", "step", curves)]


def train(setup: Setup, arguments: argparse.Namespace, seed: int) -> Path:
    """Fine-tune once."""
    return setup.train(
        f"sft_{seed}",
        data=data_table(setup, arguments),
        training={"steps": arguments.steps},
        schedule=schedule(arguments.rate, arguments.steps),
        seed=seed,
    )


def data_table(setup: Setup, arguments: argparse.Namespace) -> dict[str, Any]:
    """Packed rows of the training problems and their solutions."""
    problems = {
        "path": str(arguments.gsm8k / "train_first2500.jsonl"),
        "form": "completion",
        "prompt_field": "question",
        "completion_field": "answer",
        "max_records": arguments.train_problems,
        "truncate": "drop",
    }
    return rows_table(setup, arguments, conversations=problems)
