"""Average checkpoints of one architecture and tokenizer, uniformly or by weights.

Each is a Hugging Face or Meta folder, a GGUF file, a run's folder or checkpoint, or hf://org/name.
Tensors are read piece by piece and summed in float32. What went in is told in DIR/averaged.json.

examples:
  llama-jax average runs/dpo-a runs/dpo-b --out averaged
  llama-jax average runs/a runs/b runs/c --weights 2 1 1 --out averaged.gguf --to gguf
"""

import argparse
import json
from pathlib import Path

from llama_jax.cli.stage_progress import stage_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `llama-jax average`."""
    parser.add_argument("paths", metavar="CHECKPOINT", nargs="+", help="at least two")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where to write")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one each; their shares count"
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
    with stage_progress("bytes") as told:
        report = average(
            arguments.paths,
            arguments.out,
            to=arguments.to,
            weights=arguments.weights,
            options=options,
            progress=told("averaging"),
        )
    if arguments.json:
        print(json.dumps(report.to_json()))
        return 0
    print(
        f"{report.dst}: the average of {len(report.ingredients)}, {report.tensors} tensors, "
        f"{report.parameters / 1e6:.2f}M parameters in {report.dtype}, {report.seconds:.1f} s"
    )
    for each in report.ingredients:
        print(f"  {each.weight:.4f}  {each.path}")
    return 0
