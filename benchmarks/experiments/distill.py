"""Distillation into a student of half the depth, beside training it on hard labels.

The teacher is the checkpoint after fine-tuning on GSM8K; the student begins as half of its layers,
a block of the middle left out. Both students see the same batches for as many steps; one is drawn
to the teacher's distribution (forward KL), the other to the solutions alone. The loss is that of
reference solutions to test problems, in nats a token.
"""

import argparse
from pathlib import Path
from typing import Any

import sft
from reports import Curve, Report, interval
from runs import Setup, read_losses, read_records, schedule
from scoring import AnswerLogps, answer_logps

from llama_jax.interchange.depth import WithLayers
from llama_jax.interchange.opening import open_source

BATCH_SIZE = 2  # rows a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    sft.add_arguments(parser)
    parser.add_argument("--student-steps", type=int, default=90)
    parser.add_argument("--student-rate", type=float, default=5e-4)
    parser.add_argument("--student-seq-len", type=int, default=256)
    parser.add_argument("--teacher", help="a fine-tuned run; default: it is trained first")


def run(setup: Setup, arguments: argparse.Namespace, report: Report) -> None:
    """The teacher, then both students with each seed."""
    teacher = arguments.teacher or str(sft.train(setup, arguments, 0))
    tested = read_records(arguments.gsm8k / "test.jsonl", arguments.test_problems)
    asked = [(r["question"], r["answer"]) for r in tested]
    report.title = "Distillation into a student of half the depth"
    report.says = [(__doc__ or "").strip()]
    report.header = ("model", "held-out loss", "below hard labels")
    scored = answer_logps(teacher, asked)
    add_row(report, "teacher", scored)
    layers = kept_layers(setup.model_table()["num_layers"])
    add_row(
        report, "student untrained", answer_logps(WithLayers(open_source(teacher), layers), asked)
    )
    curves: dict[str, list[Curve]] = {"hard labels": [], "distilled": []}
    for seed in setup.seeds:
        hard: AnswerLogps | None = None
        for kind, lines in curves.items():
            folder = train_student(setup, arguments, teacher, kind, seed)
            scored = answer_logps(str(folder), asked)
            add_row(report, f"{kind}, seed {seed}", scored, hard)
            hard = hard or scored
            lines.append(Curve(f"seed {seed}", *read_losses(folder)))
    report.panels = [
        ("hard labels: cross entropy", "step", curves["hard labels"]),
        ("distilled: KL from the teacher", "step", curves["distilled"]),
    ]


def train_student(
    setup: Setup, arguments: argparse.Namespace, teacher: str, kind: str, seed: int
) -> Path:
    """Half of the teacher's layers, trained in one of two ways."""
    layers = kept_layers(setup.model_table()["num_layers"])
    table: dict[str, Any] = {"kind": "next_token"}
    if kind == "distilled":
        table = {"kind": "distill", "path": teacher}
    steps = arguments.student_steps
    rows = argparse.Namespace(**vars(arguments) | {"seq_len": arguments.student_seq_len})
    return setup.train(
        f"{kind.replace(' ', '_')}_{seed}",
        model=setup.model_table(num_layers=len(layers)),
        init={"path": teacher, "layers": layers},
        objective=table,
        data=sft.data_table(setup, rows),
        training={"steps": steps},
        schedule=schedule(arguments.student_rate, steps),
        seed=seed,
    )


def kept_layers(depth: int) -> list[int]:
    """The first sixth and the last third of them: what is farthest from the middle counts most."""
    half, first = depth // 2, depth // 6
    return [*range(first), *range(depth - half + first, depth)]


def add_row(
    report: Report, name: str, scored: AnswerLogps, hard: AnswerLogps | None = None
) -> None:
    """A row of the table; with `hard`, how far below its loss this one is."""
    below = None
    if hard is not None:
        below = hard.loss - scored.loss, hard.loss_interval(scored)
    report.rows.append(
        (name, interval(scored.loss, scored.loss_interval()), interval(*below) if below else "")
    )
    report.figures[name] = {
        "loss": scored.loss,
        "loss_interval": scored.loss_interval(),
        "below_hard_labels": below,
    }
