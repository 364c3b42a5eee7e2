"""Continue prompts, or reply to conversations, with a model of any format.

With --json, a JSON line a completion: prompt_ids, ids, text, finish_reason (stop or length), stop
(the id or text that ended it), logprobs where asked for, and in a conversation the reply as a
message. Otherwise prompt and text; one alone is shown as it comes.

examples:
  llama-jax generate --model runs/quickstart --prompt 'def main():' --max-new-tokens 64
  llama-jax generate --model SmolLM2.gguf --chat --prompt 'Who are you?' --temperature 0
  llama-jax generate --model llama --prompts questions.jsonl --chat --json --n 4 > answers.jsonl
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.cli.model_arguments import (
    add_model_arguments,
    add_sampling_arguments,
    checked_wishes,
    open_model,
)
from llama_jax.config.loading import ConfigError

if TYPE_CHECKING:
    from llama_jax.inference.generating import Answer, Task
    from llama_jax.inference.requests import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `llama-jax generate`."""
    add_model_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt a line, or JSON lines with 'prompt' or 'messages'; - reads stdin",
    )
    parser.add_argument(
        "--chat", action="store_true", help="prompts are a user's messages; reply to them"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of each conversation")
    add_sampling_arguments(parser, max_new_tokens=None)
    parser.add_argument("--n", type=int, default=1, metavar="N", help="completions of each prompt")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="B",
        help="completions made at once; changes none of them (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--logprobs", action="store_true", help="log-probability of each token")
    parser.add_argument("--json", action="store_true", help="JSON lines on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Generate; 0 when all completions are done."""
    from llama_jax.inference.generating import make_task
    from llama_jax.inference.requests import is_conversation

    wishes = checked_wishes(arguments)
    for name in ("n", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ConfigError("at least 1", key=f"--{name.replace('_', '-')}")
    requests = _read(arguments)
    chat = arguments.chat or any(map(is_conversation, requests))
    for option in ("system", "chat_format"):
        if getattr(arguments, option) is not None and not chat:
            raise ConfigError("needs --chat", key=f"--{option.replace('_', '-')}")
    session = open_model(arguments, chat=chat, batch_size=arguments.batch_size)
    task = make_task(
        session,
        requests,
        wishes,
        chat=arguments.chat,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
    )
    if len(requests) == arguments.n == 1 and not (arguments.json or arguments.logprobs):
        return _stream(task)
    answers = task.answers(n=arguments.n, batch_size=arguments.batch_size)
    for number, answer in enumerate(answers):
        if arguments.json:
            print(json.dumps(answer.to_json(), ensure_ascii=False), flush=True)
        else:
            _show(answer, number, len(requests), arguments.n)
    return 0


def _read(arguments: argparse.Namespace) -> "list[Request]":
    from llama_jax.inference.requests import Request, parse_requests, read_requests

    if arguments.prompt is not None:
        return [Request(prompt=arguments.prompt)]
    if arguments.prompts == "-":
        return parse_requests(sys.stdin.read().split("\n"), "stdin")
    return read_requests(Path(arguments.prompts))


def _stream(task: "Task") -> int:
    """One completion, as it comes; how it ended goes to stderr."""
    from llama_jax.cli.waiting import waiting

    # The prompt comes with the first text: a line that is begun has no room for the sign.
    shown = _shown_prompt(task.requests[0])
    with waiting("compiling and reading the prompt") as sign:
        for piece in task.stream():
            sign.end()
            print(shown, piece.text, sep="", end="", flush=True)
            shown = ""
            if piece.completion is not None:
                print(flush=True)
                count = len(piece.completion.ids)
                print(f"[{piece.completion.finish_reason}, {count} tokens]", file=sys.stderr)
    return 0


def _show(answer: "Answer", number: int, prompts: int, n: int) -> None:
    place, sample = divmod(number, n)
    header = f"prompt {place + 1} of {prompts}, sample {sample + 1} of {n}"
    print(f"--- {header}: {answer.completion.finish_reason} ---")
    print(_shown_prompt(answer.request), answer.completion.text, sep="")
    for line in _logprob_lines(answer):
        print(line)


def _shown_prompt(request: "Request") -> str:
    """A prompt is what the text continues; a question stands above its reply."""
    if request.prompt is not None:
        return request.prompt
    return "".join(f"{message.role}: {message.content}\n\n" for message in request.messages)


def _logprob_lines(answer: "Answer") -> Iterator[str]:
    for text, logprob in zip(answer.token_texts(), answer.completion.logprobs or (), strict=False):
        yield f"{logprob:9.4f}  {text!r}"
