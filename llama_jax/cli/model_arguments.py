"""The options that `generate` and `chat` share: which model, where it runs, how it draws."""

import argparse
import datetime
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.inference.sampling_choice import Wishes
    from llama_jax.inference.sessions import Session
    from llama_jax.interchange.loading import Progress


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the model, its chat format, dtype, mesh and platform."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="Hugging Face or Meta folder, GGUF file, a run's folder or checkpoint, hf://org/name",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="merged into the model: a PEFT folder, a run that trained adapters, hf://org/name",
    )
    parser.add_argument(
        "--chat-format",
        metavar="NAME",
        help="llama2, codellama-70b, llama3, llama3.1, chatml, zephyr or template; "
        "default: a run's own, the template of the model's files, or by the vocabulary",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of parameters and computation; default: float32 on CPUs, bfloat16 elsewhere",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="size of a mesh axis, such as --set mesh.tensor=4; repeatable",
    )
    parser.add_argument(
        "--platform", choices=("cpu", "gpu", "tpu"), help="use this one, or fail if it isn't there"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int | None) -> None:
    """Declare how tokens are drawn and what ends a completion."""
    group = parser.add_argument_group(
        "sampling",
        "defaults: the model's generation config; where it says nothing, temperature 0.6 and "
        "top-p 0.9, as Meta's code",
    )
    length = "256, or what the context leaves" if max_new_tokens is None else max_new_tokens
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N",
                       help=f"default {length}")  # fmt: skip
    group.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest token")
    group.add_argument("--top-k", type=int, metavar="K", help="among the K likeliest")
    group.add_argument("--top-p", type=float, metavar="P",
                       help="among the likeliest that make up P")  # fmt: skip
    group.add_argument("--min-p", type=float, metavar="P",
                       help="among those at least P times as likely as the likeliest")  # fmt: skip
    group.add_argument("--repetition-penalty", type=float, metavar="R",
                       help="divides the logits of tokens that occurred")  # fmt: skip
    group.add_argument("--presence-penalty", type=float, metavar="P",
                       help="taken from the logits of tokens already generated")  # fmt: skip
    group.add_argument("--stop", action="append", default=[], metavar="TEXT",
                       help="end before this text; repeatable")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="S", help="default %(default)s")


def checked_wishes(arguments: argparse.Namespace) -> "Wishes":
    """What the sampling options ask for; a value out of range is told before a model is loaded."""
    from llama_jax.inference.sampling_choice import Wishes, choose_sampling
    from llama_jax.interchange.generation_defaults import GenerationDefaults

    wishes = Wishes(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        seed=arguments.seed,
        stop_strings=tuple(arguments.stop),
        logprobs=getattr(arguments, "logprobs", False),
    )
    length = 1 if arguments.max_new_tokens is None else arguments.max_new_tokens
    choose_sampling(
        wishes, GenerationDefaults(), stop_ids=frozenset(), max_new_tokens=length
    )  # fmt: skip
    return wishes


def open_model(arguments: argparse.Namespace, *, chat: bool, batch_size: int = 1) -> "Session":
    """The model of `--model`, with progress on stderr."""
    from llama_jax.training.environment import (
        describe_devices,
        enable_compilation_cache,
        select_platform,
    )

    select_platform(arguments.platform)
    enable_compilation_cache()

    from llama_jax.inference.sessions import open_session

    with _progress() as progress:
        session = open_session(
            arguments.model,
            chat=chat,
            chat_format=arguments.chat_format,
            date=datetime.date.today(),
            dtype=arguments.dtype,
            overrides=arguments.set,
            batch_size=batch_size,
            adapter=arguments.adapter,
            progress=progress,
        )
    print(f"{session.source.path}: {describe_devices()}", file=sys.stderr)
    return session


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:  # fmt: skip
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
