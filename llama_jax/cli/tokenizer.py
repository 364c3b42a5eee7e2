"""Train a vocabulary; turn text into token ids and back.

examples:
  llama-jax tokenizer train stdlib --vocab-size 4096 --out tokenizers/python
  llama-jax tokenizer train texts/ --kind sentencepiece --vocab-size 32000 --out tokenizers/texts
  llama-jax tokenizer encode --tokenizer tokenizers/python --bos 'Hello world'
  llama-jax tokenizer encode --tokenizer model.gguf 'Hello world'
  llama-jax tokenizer decode --tokenizer tokenizers/python 4080 72 101
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from llama_jax.cli.source_arguments import add_source_arguments, source_of
from llama_jax.config.loading import ConfigError
from llama_jax.config.run import TrainedTokenizer
from llama_jax.tokenizers import load_tokenizer
from llama_jax.tokenizers.training import TRAINERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verbs `train`, `encode` and `decode`."""
    verbs = parser.add_subparsers(dest="action", metavar="train|encode|decode", required=True)
    training = verbs.add_parser("train", help="train a vocabulary on text")
    add_source_arguments(training)
    training.add_argument(
        "--kind",
        choices=sorted(TRAINERS, reverse=True),
        default="tiktoken",
        help="Llama 3's: byte-level BPE, 16 special tokens; or Llama 2's: BPE with byte fallback",
    )
    training.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="special tokens included"
    )
    training.add_argument("--out", required=True, type=Path, metavar="DIR")
    training.add_argument("--json", action="store_true", help="print the figures as JSON")
    _add_encode_arguments(verbs.add_parser("encode", help="print the ids of a text"))
    _add_decode_arguments(verbs.add_parser("decode", help="print the text of ids"))


def run(arguments: argparse.Namespace) -> int:
    """Train, encode or decode."""
    actions = {"train": _train, "encode": _encode, "decode": _decode}
    return actions[arguments.action](arguments)


def _add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    _add_tokenizer_argument(parser)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="default: read from stdin")
    parser.add_argument("--bos", action="store_true", help="begin with the begin token")
    parser.add_argument("--eos", action="store_true", help="end with the end token")
    parser.add_argument(
        "--allow-special",
        action="append",
        default=[],
        metavar="NAME",
        help="a special token that the text may spell, e.g. '<|eot_id|>', or 'all'; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print ids and figures as JSON")


def _add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    _add_tokenizer_argument(parser)
    parser.add_argument("ids", nargs="*", metavar="ID", help="default: read from stdin")
    parser.add_argument("--json", action="store_true", help="print the text as JSON")


def _add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="tokenizer.model, tokenizer.json, a GGUF file, a folder, or 'byte'",
    )


def _train(arguments: argparse.Namespace) -> int:
    from llama_jax.data.vocabulary import train_vocabulary

    if (arguments.out / "tokenizer.model").exists():
        raise ConfigError(f"{arguments.out} already holds a tokenizer", source="--out")
    wanted = TrainedTokenizer(arguments.vocab_size, model=arguments.kind)
    tokenizer, report = train_vocabulary(source_of(arguments), wanted)
    tokenizer.save(arguments.out)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        part = "held-out" if report.measured_on == "held_out" else "its own training"
        print(f"{report.vocab_size} tokens, trained on {report.files} files, in {arguments.out}")
        print(f"{report.bytes_per_token:.3f} bytes a token on {part} text")
    return 0


def _encode(arguments: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(arguments.tokenizer)
    text = sys.stdin.read() if arguments.text is None else arguments.text
    allowed = frozenset(arguments.allow_special)
    if "all" in allowed:
        allowed = frozenset(tokenizer.special)
    ids = tokenizer.encode(text, bos=arguments.bos, eos=arguments.eos, allowed_special=allowed)
    if arguments.json:
        size = len(text.encode("utf-8", "replace"))
        print(json.dumps({"ids": ids, "tokens": len(ids), "bytes": size}))
    else:
        print(*ids)
    return 0


def _decode(arguments: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(arguments.tokenizer)
    words = arguments.ids or sys.stdin.read().split()
    try:
        ids = [int(word) for word in words]
    except ValueError as error:
        raise ConfigError(str(error), source="ID") from None
    text = tokenizer.decode(ids)
    print(json.dumps({"text": text}) if arguments.json else text)
    return 0
