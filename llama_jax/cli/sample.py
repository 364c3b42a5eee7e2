"""Rejection sampling as a TOML file says: K samples a prompt, scored and verified, the best kept.

DIR gets samples.jsonl, scores.jsonl, conversations.jsonl (the best answers, for SFT),
preferences.jsonl (pairs, for reward models and DPO), summary.json and yield.png; with a critic,
critic/ too.
A killed call goes on where it ended. A file:

  prompts = "train.jsonl"             # prompt or messages, and answer or tests for verifiers
  k = 10
  model = { path = "runs/sft" }
  draw = { temperature = 1.0, max_new_tokens = 256, seed = 0 }
  verifiers = [{ kind = "answer" }]   # also tests, pattern
  reward = { path = "runs/reward" }   # a reward model; either of the two may be left out

examples:
  llama-jax sample sample.toml --out samples/gsm8k
  llama-jax sample sample.toml --out samples/k4 --set k=4 --set draw.seed=1 --json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.synthesis.running import Sampled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `llama-jax sample`."""
    parser.add_argument("file", metavar="SAMPLE.toml", type=Path)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to fill")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field, such as --set k=4; repeatable",
    )
    parser.add_argument(
        "--platform", choices=("cpu", "gpu", "tpu"), help="use this one, or fail if it isn't there"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Sample; 0 when all is there."""
    from llama_jax.cli.stage_progress import stage_progress
    from llama_jax.synthesis.settings import load_sampling_config

    config = load_sampling_config(arguments.file, tuple(arguments.set))

    from llama_jax.synthesis.running import run_sampling
    from llama_jax.training.environment import enable_compilation_cache, select_platform

    select_platform(arguments.platform)
    enable_compilation_cache()
    with stage_progress("prompts") as told:
        sampled = run_sampling(config, arguments.out, told)
    if arguments.json:
        figures = dict(sampled.selection.figures)
        if sampled.corrections is not None:
            figures["corrections"] = sampled.corrections.to_json()
        print(json.dumps({"folder": str(arguments.out), **figures}))
    else:
        _show(sampled, arguments.out)
    return 0


def _show(sampled: "Sampled", folder: Path) -> None:
    figures = sampled.selection.figures
    print(
        f"{folder}: {figures['prompts']} prompts, {figures['k']} samples each, "
        f"{figures['mean_tokens']:.0f} tokens a sample, {figures['truncated']} cut; "
        f"{sampled.selection.kept} answers kept, {sampled.selection.pairs} pairs"
    )
    _show_curves(figures)
    if sampled.corrections is not None:
        done = sampled.corrections
        why = "".join(f", {count} {reason}" for reason, count in done.refused.items())
        print(f"critic: {done.poor} poor, {done.corrected} corrected{why}")


def _show_curves(figures: Mapping[str, Any]) -> None:
    scores, right = figures.get("scores", {}), figures.get("right", {})
    curves = {
        "best score": scores.get("best_of"),
        "right, any of K": right.get("pass_at"),
        "right, best of K": right.get("best_of"),
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return
    ks = _shown_ks(figures["k"])
    print(_row("K", map(str, ks)))
    for name, curve in curves.items():
        print(_row(name, (f"{curve[k - 1]:.3f}" for k in ks)))


def _row(name: str, cells: Any) -> str:
    return f"{name:<18}" + "".join(f"{cell:>9}" for cell in cells)


def _shown_ks(most: int) -> Sequence[int]:
    """1, 2, 4, ... and the last."""
    return sorted({1 << i for i in range(most.bit_length()) if 1 << i <= most} | {most})
