"""Average checkpoints of one architecture and tokenizer: uniformly, by weights, or greedily.

Each is a Hugging Face or Meta folder, a GGUF file, a run's folder or checkpoint, or hf://org/name.
Tensors are read piece by piece and summed in float32. What went in is told in DIR/averaged.json.
--greedy RUN.toml makes a greedy soup (arXiv 2203.05482): by their losses on what that run holds
out, the best first, each is kept if the mean with it is no worse. The run's file says data,
objective and tokenizer; its model must be the checkpoints'.

examples:
  llama-jax average runs/dpo-a runs/dpo-b --out averaged
  llama-jax average runs/a runs/b runs/c --weights 2 1 1 --out averaged.gguf --to gguf
  llama-jax average runs/a runs/b runs/c --greedy debug/sft --out soup
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.cli.stage_progress import stage_progress
from llama_jax.config.loading import ConfigError

if TYPE_CHECKING:
    from llama_jax.interchange.averaging import AverageReport, Ingredient
    from llama_jax.interchange.averaging_greedy import HeldOutLoss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `llama-jax average`."""
    parser.add_argument("paths", metavar="CHECKPOINT", nargs="+", help="at least two")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where to write")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one each; their shares count"
    )
    parser.add_argument(
        "--greedy", metavar="RUN.toml", help="keep what is good on what this run holds out"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of --greedy's run, such as --set training.eval_batches=8; repeatable",
    )
    parser.add_argument(
        "--platform", choices=("cpu", "gpu", "tpu"), help="what --greedy computes on, or fail"
    )
    parser.add_argument(
        "--to", default="hf", metavar="hf|meta|gguf|orbax", help="format (default %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16, float16, for GGUF also q8_0; default: as the first is stored",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DIR")
    parser.add_argument("--no-tokenizer", action="store_true", help="average the weights alone")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Average; 0 when written."""
    from llama_jax.interchange.averaging import average
    from llama_jax.interchange.conversion_options import Options

    options = Options(
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        tokenizer=not arguments.no_tokenizer,
    )
    with _held_out_loss(arguments) as held_out_loss, stage_progress("bytes") as told:
        report = average(
            arguments.paths,
            arguments.out,
            to=arguments.to,
            weights=arguments.weights,
            held_out_loss=held_out_loss,
            options=options,
            progress=told("averaging"),
            said=_say,
        )
    if arguments.json:
        print(json.dumps(report.to_json()))
    else:
        _show(report)
    return 0


@contextlib.contextmanager
def _held_out_loss(arguments: argparse.Namespace) -> "Iterator[HeldOutLoss | None]":
    """What --greedy chooses by, or None; nothing that computes is loaded without it."""
    if arguments.greedy is None:
        for option in ("set", "platform"):
            if getattr(arguments, option):
                raise ConfigError("has no meaning without --greedy", key=f"--{option}")
        yield None
        return
    if arguments.weights is not None:
        raise ConfigError("a greedy soup's weights are its own", key="--weights")
    from llama_jax.config.files import load_run_config
    from llama_jax.training.environment import enable_compilation_cache, select_platform

    config = load_run_config(arguments.greedy, arguments.set)
    select_platform(arguments.platform)
    enable_compilation_cache()

    from llama_jax.training.held_out_loss import opened_held_out_loss

    with opened_held_out_loss(
        config, arguments.paths[0], own_tokenizer=not arguments.no_tokenizer, say=_say
    ) as loss:
        yield loss


def _show(report: "AverageReport") -> None:
    count, soup = str(len(report.ingredients)), ""
    if report.loss is not None:
        kept = sum(each.weight > 0 for each in report.ingredients)
        count, soup = f"{kept} of {count}", f", held-out loss {report.loss:.4f}"
    print(
        f"{report.dst}: the average of {count}, {report.tensors} tensors, "
        f"{report.parameters / 1e6:.2f}M parameters in {report.dtype}, {report.seconds:.1f} s{soup}"
    )
    for each in sorted(report.ingredients, key=_place):
        print(f"  {each.weight:.4f}  {each.path}{_told(each)}")


def _place(each: "Ingredient") -> int:
    """As they were tried; as they were given where none was."""
    return each.trial.place if each.trial else 0


def _told(each: "Ingredient") -> str:
    trial = each.trial
    if trial is None:
        return ""
    kept = "kept" if trial.kept else "left out"
    return f"  loss {trial.loss:.4f}, {kept}: the mean with it {trial.soup_loss:.4f}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
