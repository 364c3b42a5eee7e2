"""Turn text into tokenised shards, and look into what a model will see.

examples:
  llama-jax data build books/ --tokenizer llama3/tokenizer.model --out shards/books
  llama-jax data build 'web/*.jsonl.zst' --text-field content --tokenizer byte --out shards/web
  llama-jax data inspect quickstart --step 100 --rows 2
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_jax.cli.source_arguments import add_source_arguments, source_of
from llama_jax.config.files import load_run_config
from llama_jax.data.build import build
from llama_jax.data.manifest import Manifest
from llama_jax.tokenizers import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verbs `build` and `inspect`."""
    verbs = parser.add_subparsers(dest="action", metavar="build|inspect", required=True)
    building = verbs.add_parser("build", help="tokenise text into ArrayRecord shards; restartable")
    _add_build_arguments(building)
    inspecting = verbs.add_parser("inspect", help="show a training batch as the model sees it")
    _add_inspect_arguments(inspecting)


def run(arguments: argparse.Namespace) -> int:
    """Build or inspect."""
    return _build(arguments) if arguments.action == "build" else _inspect(arguments)


def _add_build_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    parser.add_argument("--part", choices=("all", "train", "held_out"), help="default: all")
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="tokenizer.model, its folder, or 'byte'"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one a core"
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail at the first document that can't be used"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest's figures as JSON")


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.toml", help="a run, by path or shipped name")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="default: runs/NAME; text is built into it"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="counted from 0")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="rows of the batch shown")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def _build(arguments: argparse.Namespace) -> int:
    manifest = build(
        source_of(arguments),
        load_tokenizer(arguments.tokenizer),
        arguments.out,
        workers=arguments.workers,
        strict=arguments.strict,
        progress=not arguments.json,
    )
    if arguments.json:
        print(json.dumps(_figures(manifest)))
    else:
        _print_manifest(manifest, arguments.out)
    return 0


def _figures(manifest: Manifest) -> dict[str, Any]:
    """The manifest, with numbers of files and shards in place of their lists."""
    counts = {"files": len(manifest.files), "shards": len(manifest.shards)}
    return {**dataclasses.asdict(manifest), **counts}


def _print_manifest(manifest: Manifest, folder: Path) -> None:
    table = Table(title=str(folder), show_header=False, title_justify="left")
    table.add_row("documents", f"{manifest.documents:,}")
    table.add_row("tokens", f"{manifest.tokens:,} ({manifest.dtype})")
    table.add_row("bytes of text", f"{manifest.bytes:,}")
    table.add_row("bytes a token", f"{manifest.bytes / manifest.tokens:.3f}")
    table.add_row("files", f"{len(manifest.files):,}")
    table.add_row("shards", f"{len(manifest.shards):,}")
    for reason, count in manifest.skipped.items():
        table.add_row(f"skipped, {reason.replace('_', ' ')}", f"{count:,}")
    Console().print(table)
    for problem in manifest.problems:
        print(f"skipped {problem}")


def _inspect(arguments: argparse.Namespace) -> int:
    from llama_jax.config.run_files import default_run_dir
    from llama_jax.data.example_files import StoredExamples
    from llama_jax.data.examples import LOSS_OF_OBJECTIVE
    from llama_jax.data.inspect import batch_table, show_batch
    from llama_jax.data.sources import open_documents, open_tokenizer

    config = load_run_config(arguments.run, arguments.set)
    run_dir = arguments.run_dir or default_run_dir(arguments.run)
    tokenizer = open_tokenizer(config, run_dir)
    documents = open_documents(
        config.data,
        "sources",
        tokenizer,
        run_dir,
        workers=os.cpu_count() or 1,
        progress=not arguments.json,
        loss_on=LOSS_OF_OBJECTIVE.get(config.objective.kind, "responses"),
    )
    summaries = [d.manifest.summary for d in documents if isinstance(d, StoredExamples)]
    wanted = {"seed": config.seed, "step": arguments.step, "rows": arguments.rows}
    if arguments.json:
        table = batch_table(config.data, documents, tokenizer, **wanted)
        print(json.dumps({**table, "summaries": [dataclasses.asdict(s) for s in summaries]}))
    else:
        for summary in summaries:
            print("\n".join(summary.lines()))
        show_batch(config.data, documents, tokenizer, Console(), **wanted)
    return 0
