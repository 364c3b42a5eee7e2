"""What to continue: prompts and conversations from a file, and the ids that a model reads."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.config.loading import ConfigError
from llama_jax.tokenizers import Tokenizer
from llama_jax.tokenizers.chat import ChatError, ChatFormat, Message, messages_from_json


@dataclass(frozen=True)
class Request:
    """A text to continue, or a conversation to reply to; `tools` are JSON schemas for it."""

    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


def is_conversation(request: Request) -> bool:
    """Whether it has messages to reply to, rather than a text to continue."""
    return request.prompt is None


def read_requests(path: Path) -> list[Request]:
    """The requests of a file: a prompt a line, or JSON lines with `prompt` (a text or messages) or
    `messages`.

    The first line that isn't empty says which: JSON lines begin with an object that has either
    field. Empty lines are skipped, fields of other names are left alone.

    Raises:
      ConfigError: no such file, nothing in it, or a line in another form, with its number.
    """
    try:
        # Editors on Windows put a byte order mark first, which is no part of a prompt.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(reason, source=str(path)) from None
    return parse_requests(lines, str(path))


def parse_requests(lines: Iterable[str], source: str) -> list[Request]:
    """The requests of these lines; see `read_requests`.

    Args:
      lines: without their ends.
      source: the file's name, for messages.
    """
    numbered = [(n, line.removesuffix("\r")) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError("no prompts in it", source=source)
    if not _is_request(_load(numbered[0][1])):
        return [Request(prompt=line) for _, line in numbered]
    return [_from_json(line, f"{source}:{number}") for number, line in numbered]


def as_conversation(request: Request, system: str | None) -> Request:
    """The request as a conversation, behind the system message if one is given.

    Raises:
      ConfigError: the conversation has a system message of its own.
    """
    if request.prompt is not None:
        request = Request(messages=(Message("user", request.prompt),), tools=request.tools)
    if system is None:
        return request
    if request.messages[0].role == "system":
        raise ConfigError("these messages have a system message already", key="--system")
    return Request(messages=(Message("system", system), *request.messages), tools=request.tools)


def encode_request(
    request: Request, tokenizer: Tokenizer, chat_format: ChatFormat | None
) -> list[int]:
    """The prompt's ids: a begin token where the model's prompts have one, and only once.

    Raises:
      ChatError: a conversation that the format can't express.
    """
    if request.prompt is not None:
        return tokenizer.encode(request.prompt, bos=tokenizer.adds_bos)
    if chat_format is None:
        raise ChatError("messages need a chat format")
    return chat_format.prompt(request.messages, tools=request.tools)


def _load(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_request(entry: Any) -> bool:
    return isinstance(entry, Mapping) and ("prompt" in entry or "messages" in entry)


def _from_json(line: str, where: str) -> Request:
    entry = _load(line)
    if not _is_request(entry):
        raise ConfigError("not a JSON object with 'prompt' or 'messages'", source=where)
    tools = entry.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError("not a list of objects", key="tools", source=where)
    if "messages" in entry and "prompt" in entry:
        raise ConfigError("'prompt' and 'messages' exclude each other", source=where)
    key = "messages" if "messages" in entry else "prompt"
    given = entry[key]
    if key == "prompt" and isinstance(given, str):
        return Request(prompt=given, tools=tuple(tools))
    if key == "prompt" and not isinstance(given, list):
        raise ConfigError("neither a text nor messages", key=key, source=where)
    try:
        messages = messages_from_json(given)
    except ChatError as error:
        raise ConfigError(str(error), source=where) from None
    if not messages:
        raise ConfigError("empty", key=key, source=where)
    return Request(messages=tuple(messages), tools=tuple(tools))
