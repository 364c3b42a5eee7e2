"""Options of the verbs that read text: they fill a `TextConfig` and leave its defaults alone."""

import argparse

from llama_jax.config.loading import from_table
from llama_jax.config.run import TextConfig


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The source and how to read it."""
    parser.add_argument(
        "path",
        metavar="SOURCE",
        help="a file, a directory, a glob in quotes, or 'stdlib' (this Python's own library)",
    )
    parser.add_argument(
        "--text-field", metavar="NAME", help="field of .jsonl and Parquet records (default: text)"
    )
    parser.add_argument(
        "--suffix",
        dest="suffixes",
        action="append",
        metavar=".EXT",
        help="take these files of a directory; may be repeated",
    )
    parser.add_argument(
        "--held-out-fraction", type=float, metavar="F", help="share of the files kept aside"
    )
    parser.add_argument("--max-bytes", type=int, metavar="N", help="stop after N bytes of text")


def source_of(arguments: argparse.Namespace) -> TextConfig:
    """The source that the options mean.

    Raises:
      ConfigError: a value out of range.
    """
    names = ("path", "text_field", "suffixes", "part", "held_out_fraction", "max_bytes")
    given = {name: getattr(arguments, name, None) for name in names}
    table = {name: value for name, value in given.items() if value is not None}
    return from_table(TextConfig, table, "llama-jax")
