"""Prompts with what their answers are held against: the records of a file, each once."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.data.files import SourceFile
from llama_jax.data.reading import Problem
from llama_jax.data.record_files import SUFFIXES, read_records
from llama_jax.inference.requests import Request, as_conversation, parse_requests, read_requests
from llama_jax.tokenizers.chat import Message, message_to_json

_READ_AS_REQUEST = ("prompt", "messages", "tools")


class SynthesisError(ValueError):
    """Data that can't be made or gone on with; `str(error)` is one line."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One thing to be answered.

    Attributes:
      number: its place in the file, from 0.
      request: a text, or a conversation to reply to.
      reference: the line's other fields, such as `answer` or `tests`; verifiers read them.
      original: what an answer is kept as the answer to, where that isn't the request: a critic is
        asked for a better answer to something.
    """

    number: int
    request: Request
    reference: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    original: Request | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation that is replied to; a text is a user's message."""
        return _messages_of(self.request)

    @property
    def kept_messages(self) -> tuple[Message, ...]:
        """The conversation that an answer is kept under."""
        return _messages_of(self.original or self.request)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of what is asked; not of the reference."""
        told = [message_to_json(message) for message in self.messages]
        text = json.dumps([self.request.prompt, told, [dict(t) for t in self.request.tools]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(path: Path, *, system: str | None = None) -> list[Prompt]:
    """The prompts of a file: a text a line, or records with `prompt` or `messages`.

    Args:
      path: JSON lines, plain, gzip or zstd, a JSON list, or Parquet, by its suffix; of any other
        suffix lines as `inference.requests.read_requests` takes them. Fields of other names become
        the prompt's reference.
      system: a system message put before each conversation; texts become users' messages then.

    Raises:
      ConfigError: the file or a record of it, with its line, item or row.
      SynthesisError: two records that ask the same, whose samples would be the same.
    """
    requests, lines = _lines(path) if _holds_lines(path) else _records(path)
    if system is not None:
        requests = [as_conversation(request, system) for request in requests]
    pairs = zip(requests, lines, strict=True)
    prompts = [Prompt(i, request, _reference(line)) for i, (request, line) in enumerate(pairs)]
    return check_distinct(prompts, str(path))


def make_prompts(entries: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """Prompts of objects as a JSON file's lines have them. Errors as `read_prompts`."""
    lines = [json.dumps(entry) for entry in entries]
    requests = parse_requests(lines, "prompts")
    pairs = zip(requests, lines, strict=True)
    return check_distinct(
        [Prompt(i, request, _reference(line)) for i, (request, line) in enumerate(pairs)], "prompts"
    )


def check_distinct(prompts: list[Prompt], source: str) -> list[Prompt]:
    """The prompts, if no two ask the same.

    Raises:
      SynthesisError: naming the two, counted from 1.
    """
    seen: dict[str, int] = {}
    for prompt in prompts:
        earlier = seen.setdefault(prompt.fingerprint, prompt.number)
        if earlier != prompt.number:
            raise SynthesisError(
                f"{source}: prompts {earlier + 1} and {prompt.number + 1} ask the same; their "
                "samples would be the same too, so leave one out"
            )
    return prompts


def _holds_lines(path: Path) -> bool:
    """Plain lines, which may be texts, and not what records are kept in."""
    return path.suffix == ".jsonl" or not path.name.endswith(SUFFIXES)


def _lines(path: Path) -> tuple[list[Request], list[str]]:
    requests = read_requests(path)
    text = path.read_text(encoding="utf-8-sig")
    numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for request, (number, line) in zip(requests, numbered, strict=True):
        # An object taken as a text would show its answer to the model.
        if request.prompt == line.removesuffix("\r") and isinstance(_loaded(line), Mapping):
            raise _unasked(_loaded(line), f"{path}:{number}")
    return requests, [line for _, line in numbered]


def _unasked(fields: Mapping[str, Any], where: str) -> ConfigError:
    known = nearest("prompt", list(fields))
    return ConfigError(f"neither 'prompt' nor 'messages'{known}", source=where)


def _records(path: Path) -> tuple[list[Request], list[str]]:
    """The requests, and each record as a line of JSON."""
    if not path.is_file():
        raise ConfigError("No such file or directory", source=str(path))
    file = SourceFile(path.name, str(path), path.stat().st_size, path.name)
    lines: list[str] = []
    for record in read_records(file, lambda size: None):
        if isinstance(record, Problem):
            if record.reason == "empty_document" and record.line is not None:
                lines.append("")
                continue
            raise ConfigError(str(record._replace(file=str(path))))
        if not {"prompt", "messages"} & record.fields.keys():
            raise _unasked(record.fields, f"{path}:{record.line}")
        # Dates and the like, which only Parquet has, are kept as texts.
        lines.append(json.dumps(record.fields, default=str))
    return parse_requests(lines, str(path)), [line for line in lines if line]


def _messages_of(request: Request) -> tuple[Message, ...]:
    if request.prompt is None:
        return request.messages
    return (Message("user", request.prompt),)


def _loaded(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _reference(line: str) -> dict[str, Any]:
    entry = _loaded(line)
    if not isinstance(entry, Mapping):
        return {}
    return {key: value for key, value in entry.items() if key not in _READ_AS_REQUEST}
