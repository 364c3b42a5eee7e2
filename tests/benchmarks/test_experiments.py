"""The experiments of docs/results on a model of two layers and data of a few bytes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
# Of one process on one device: these are users' commands.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": ""}


def call(*words):
    subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that answers sums, often wrongly, and files of the names that GSM8K's have."""
    folder = tmp_path_factory.mktemp("experiments")
    settings = ["training.steps=150", "training.eval_every=150", "checkpoint.every=150"]
    call(
        *("-m", "llama_jax", "train", "debug/sft", "--run-dir", str(folder / "start")),
        *(word for each in settings for word in ("--set", each)),
    )
    draw = random.Random(0)
    problems = [problem(a, b) for a in range(9) for b in range(9)]
    draw.shuffle(problems)
    write(folder / "train_first2500.jsonl", problems[:64])
    write(folder / "test.jsonl", problems[64:76])
    write(folder / "model_solutions_first500.jsonl", [graded(draw) for _ in range(60)])
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def problem(a, b):
    return {"question": f"Add {a} and {b}.", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}


def graded(draw):
    """Right solutions end in one letter, wrong ones in another: what any model can learn."""
    solutions = {"question": f"Add {draw.randint(0, 99)} and {draw.randint(0, 99)}."}
    for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        is_correct = draw.random() < 0.5
        text = f"{draw.randint(100, 999)} {'y' if is_correct else 'n'}"
        solutions[model] = {"is_correct": is_correct, "solution": text}
    return solutions


def experiment(folder, name, *words):
    call(
        *("benchmarks/experiments", name, "--checkpoint", str(folder / "start")),
        *("--out", str(folder / "out"), "--work", str(folder / "work")),
        *("--seeds", "3", "--batch-size", "4"),
        *map(str, words),
    )
    out = folder / "out"
    table = (out / f"{name}.md").read_text()
    assert table.startswith("# ")
    assert f"![curves]({name}.png)" in table
    assert (out / f"{name}.png").stat().st_size > 10_000
    return json.loads((out / f"{name}.json").read_text()), table


def test_fine_tuning_lowers_the_held_out_loss(folder):
    figures, table = experiment(
        *(folder, "sft", "--gsm8k", folder, "--seq-len", 128, "--steps", 30, "--rate", 3e-3),
        *("--test-problems", 12, "--answer-tokens", 16),
    )
    below, (low, high) = figures["seed 3"]["below_before"]
    assert figures["before"]["loss"] - figures["seed 3"]["loss"] == pytest.approx(below)
    assert 0.5 < low < below < high
    assert figures["seed 3"]["of"] == 12
    assert table.count("\n| ") == 4
    # A second call finds the runs made and tells the same.
    again, _ = experiment(
        *(folder, "sft", "--gsm8k", folder, "--seq-len", 128, "--steps", 30, "--rate", 3e-3),
        *("--test-problems", 12, "--answer-tokens", 16),
    )
    assert again == figures
    with pytest.raises(subprocess.CalledProcessError):
        experiment(
            *(folder, "sft", "--gsm8k", folder, "--seq-len", 128, "--steps", 31, "--rate", 3e-3),
            *("--test-problems", 12, "--answer-tokens", 16),
        )


def test_a_reward_model_learns_what_sets_right_from_wrong(folder):
    figures, _ = experiment(
        *(folder, "reward", "--gsm8k", folder, "--seq-len", 128, "--steps", 60, "--rate", 3e-3),
        *("--problems", 60, "--held-out-problems", 20, "--pairs-a-problem", 4),
    )
    accuracy, (low, _) = figures["seed 3"]["accuracy"]
    assert accuracy > 0.85
    assert low > 0.7
    assert figures["seed 3"]["pairs"] > 20


def test_dpo_widens_the_margin_of_verified_answers_it_has_not_seen(folder):
    figures, table = experiment(
        *(folder, "preference", "--seq-len", 256, "--prompts", 60, "--held-out-prompts", 30),
        *("--largest", 8, "--k", 12, "--temperature", 1, "--answer-tokens", 12),
        *("--sft-steps", 10, "--sft-rate", 1e-3, "--dpo-steps", 30, "--dpo-rate", 1e-3),
    )
    before, after = figures["before"], figures["and DPO, seed 3"]
    assert after["margin"][0] > before["margin"][0]
    assert list(figures)[2:] == ["before", "fine-tuned, seed 3", "and DPO, seed 3"]
    assert "of answers are right" in table


def test_a_student_of_half_the_depth_learns_in_both_ways(folder):
    figures, _ = experiment(
        *(folder, "distill", "--gsm8k", folder, "--seq-len", 128, "--steps", 30, "--rate", 3e-3),
        *("--test-problems", 12, "--student-steps", 40, "--student-rate", 3e-3),
    )
    assert figures["teacher"]["loss"] < 2.5
    for kind in ("hard labels", "distilled"):
        assert figures[f"{kind}, seed 3"]["loss"] < 3.5
    assert figures["distilled, seed 3"]["below_hard_labels"][0] == pytest.approx(
        figures["hard labels, seed 3"]["loss"] - figures["distilled, seed 3"]["loss"]
    )
