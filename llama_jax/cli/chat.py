"""Talk with a model of any format in the terminal.

Earlier turns stay in the model's context; when it is full, the oldest exchange is left out, and
you are told. Ctrl-C stops a reply and keeps what came, Ctrl-D ends. Commands:
  /system TEXT  set the system message, and begin anew; alone, show it
  /reset        forget all turns
  /save FILE    write the conversation as JSON lines
  /help         show these
  /quit         end
A message that begins with a slash is typed with two.

examples:
  llama-jax chat --model SmolLM2.gguf
  llama-jax chat --model runs/quickstart --chat-format llama3 --temperature 0.8
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.cli.model_arguments import (
    add_model_arguments,
    add_sampling_arguments,
    checked_wishes,
    open_model,
)
from llama_jax.config.loading import nearest

if TYPE_CHECKING:
    from llama_jax.inference.conversation import Conversation

COMMANDS = ("/system", "/reset", "/save", "/help", "/quit")
_HELP = """/system TEXT  set the system message, and begin anew; alone, show it
/reset        forget all turns
/save FILE    write the conversation as JSON lines
/quit         end (so does Ctrl-D); Ctrl-C stops a reply"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `llama-jax chat`."""
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_arguments(parser, max_new_tokens=1024)


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends."""
    from llama_jax.inference.conversation import Conversation
    from llama_jax.inference.sampling_choice import choose_sampling, choose_stop_ids

    wishes = checked_wishes(arguments)
    session = open_model(arguments, chat=True)
    defaults = session.source.generation
    stop_ids = choose_stop_ids(session.tokenizer, defaults, session.chat_format)
    sampling = choose_sampling(
        wishes, defaults, stop_ids=stop_ids, max_new_tokens=arguments.max_new_tokens
    )
    conversation = Conversation(session, sampling, arguments.system)
    assert session.chat_format is not None
    _note(f"chat format {session.chat_format.name}; /help shows the commands")
    while (line := _read_line()) is not None:
        if line.startswith("/") and not line.startswith("//"):
            if not _obey(conversation, line):
                break
        elif line.strip():
            _answer(conversation, line.removeprefix("/") if line.startswith("//") else line)
    return 0


def _read_line() -> str | None:
    """The next line; None at the end of the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        # Gives input() its line editing and history, where Python has it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            return input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            _note("/quit or Ctrl-D ends")


def _obey(conversation: "Conversation", line: str) -> bool:
    """Follow a command; False where it ends the conversation."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command == "/quit":
        return False
    if command == "/help":
        print(_HELP)
    elif command == "/reset":
        conversation.reset()
        _note("forgot all turns")
    elif command == "/system":
        _set_system(conversation, rest)
    elif command == "/save":
        _save(conversation, rest)
    else:
        _note(f"unknown command '{command}'{nearest(command, COMMANDS)}")
    return True


def _set_system(conversation: "Conversation", text: str) -> None:
    if not text:
        print(conversation.system if conversation.system is not None else "(no system message)")
        return
    conversation.reset()
    conversation.system = text
    _note("system message set; forgot all turns")


def _save(conversation: "Conversation", name: str) -> None:
    from llama_jax.tokenizers.chat import ChatError

    if not name:
        _note("/save needs a file's name")
        return
    try:
        count = conversation.save(Path(name).expanduser())
    except ChatError as error:
        _note(str(error))
    else:
        _note(f"wrote {count} messages to {name}")


def _answer(conversation: "Conversation", text: str) -> None:
    """Print the reply as it comes, then what there is to say about it."""
    from llama_jax.cli.waiting import waiting
    from llama_jax.tokenizers.chat import ChatError

    hint = "reading" if conversation.messages else "compiling; the next replies come sooner"
    try:
        with contextlib.closing(conversation.reply(text)) as pieces, waiting(hint) as sign:
            for piece in pieces:
                sign.end()
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass  # what came is kept
    except ChatError as error:
        _note(str(error))
        return
    print(flush=True)
    for note in conversation.notes():
        _note(note)


def _note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
