"""Turn a checkpoint into another format, and compare the logits of both.

SRC is a Hugging Face or Meta folder, a GGUF file, a run's folder or checkpoint, a folder that
this made, or hf://org/name. It is written beside DST and renamed into place.

With --adapter, or where SRC is a run that trained adapters, these are merged into the weights;
--to peft writes the adapters alone, as PEFT reads them.

examples:
  llama-jax convert SmolLM2.gguf smollm2 --to hf --dtype bfloat16
  llama-jax convert runs/quickstart quickstart.gguf --to gguf
  llama-jax convert llama-3.2-1b merged --to hf --adapter runs/lora
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.interchange.converting import Report
    from llama_jax.interchange.loading import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `llama-jax convert`."""
    parser.add_argument("src", metavar="SRC", help="the checkpoint to read")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder, or file of GGUF, to write")
    parser.add_argument(
        "--to", required=True, metavar="hf|meta|gguf|orbax|peft", help="format of DST"
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="merged into SRC: a PEFT folder, a run that trained adapters, hf://org/name",
    )
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16, float16, for GGUF also q8_0; default: as stored",
    )
    parser.add_argument(
        "--shard-size", metavar="SIZE", help="most bytes of a file, for hf: 5GB (default), 500MB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    parser.add_argument("--no-verify", action="store_true", help="don't compare the logits")
    parser.add_argument("--no-tokenizer", action="store_true", help="convert the weights alone")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Convert; 0 when written and, where asked for, the same."""
    from llama_jax.interchange.conversion_options import parse_size
    from llama_jax.interchange.converting import convert

    size = arguments.shard_size
    with _progress() as progress:
        report = convert(
            arguments.src,
            arguments.dst,
            arguments.to,
            adapter=arguments.adapter,
            dtype=arguments.dtype,
            shard_size=None if size is None else parse_size(size),
            overwrite=arguments.overwrite,
            verify=not arguments.no_verify,
            tokenizer=not arguments.no_tokenizer,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _show(report)
    return 0


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A bar on stderr, where that is a terminal; stdout holds the figures alone."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(report: "Report") -> None:
    stored = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in report.kinds.items())
    print(
        f"{report.src} ({report.src_format}) to {report.dst} ({report.dst_format}): "
        f"{report.tensors} tensors, {report.parameters / 1e6:.2f}M parameters, {stored}, "
        f"{report.seconds:.1f} s"
    )
    for note in report.notes:
        print(f"note: {note}")
    comparison = report.comparison
    if comparison is None:
        print("logits: not compared")
        return
    kind = "same values" if report.exact else "values rounded"
    print(
        f"logits of {comparison.tokens} tokens ({kind}): largest difference "
        f"{comparison.max_difference:.3g} of {comparison.largest_logit:.3g}; most likely token "
        f"the same at {comparison.same_top} of {comparison.tokens}"
    )
