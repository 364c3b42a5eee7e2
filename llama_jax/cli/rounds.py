"""Rounds of post-training as a TOML file says; a killed call goes on where it stopped.

Each stage has a table: sft, sample, score, critic, reward, dpo, average, compare; one without a
table is left out. Training stages name a run's file, in which @model, @start and @last are models
of the rounds, @conversations and @preferences what was made of samples; where no sample was of use
the stage is skipped, and a round in which nothing could train is an error. DIR gets a folder a
round with a folder a stage, and report.md with all figures. A file:

  start = "runs/base"
  rounds = 2
  prompts = ["train.jsonl"]
  held_out = "held_out.jsonl"
  sample = { k = 10, draw = { temperature = 1.0, max_new_tokens = 256 } }
  score = { verifiers = [{ kind = "answer" }] }
  sft = { run = "sft.toml", set = ['init.path="@start"'] }
  dpo = { run = "dpo.toml", set = ['init.path="@model"'] }
  compare = { judge = "verifiers", against = "last" }

examples:
  llama-jax rounds arithmetic
  llama-jax rounds rounds.toml --dir rounds/gsm8k
  llama-jax rounds rounds.toml --dir rounds/no-dpo --without dpo
"""

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `llama-jax rounds`."""
    parser.add_argument(
        "file", metavar="ROUND.toml", help="a file, or the name of a shipped one: arithmetic"
    )
    parser.add_argument("--dir", metavar="DIR", type=Path, help="default rounds/<name>")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="STAGE",
        help="leave it out; a DIR begun with other stages is refused; repeatable",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field, such as --set rounds=3; repeatable",
    )
    parser.add_argument(
        "--platform", choices=("cpu", "gpu", "tpu"), help="use this one, or fail if it isn't there"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run them; 0 when all rounds are done, 130 or 143 when a signal stopped a training stage."""
    from llama_jax.recipes.settings import load_rounds_config

    config = load_rounds_config(arguments.file, arguments.set, arguments.without)

    from llama_jax.recipes.post_training import run_post_training
    from llama_jax.recipes.report import read_rounds
    from llama_jax.recipes.training_stages import StoppedError
    from llama_jax.training.environment import enable_compilation_cache, select_platform

    select_platform(arguments.platform)
    enable_compilation_cache()
    folder = arguments.dir or Path("rounds") / Path(arguments.file).name.removesuffix(".toml")
    try:
        run_post_training(config, folder, say=_say)
    except StoppedError as stopped:
        print(f"llama-jax: {stopped}", file=sys.stderr)
        return stopped.exit_code
    if arguments.json:
        print(json.dumps({"folder": str(folder), "rounds": read_rounds(folder)}))
    else:
        print((folder / "report.md").read_text(encoding="utf-8"), end="")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
