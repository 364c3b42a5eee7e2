"""Conversations as data: messages, the calls of tools in them, and what encoding gives."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_jax.config.loading import nearest

# What a tool answers is `tool`; Llama 3 spells it `ipython`, and both are read.
ROLES = ("system", "user", "assistant", "tool")
# OpenAI's other names, of its later and its older form.
_OTHER_NAMES = {"developer": "system", "function": "tool"}


class ChatError(ValueError):
    """A conversation, template or format that can't be used; `str(error)` is one line."""


@dataclass(frozen=True)
class ToolCall:
    """A call that an assistant wrote; the code of `code_interpreter` is its argument `code`."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
      role: system, user, assistant or tool (also written `ipython`).
      content: its text; a tool's is what it returned.
      tool_calls: an assistant's calls, after its text.
      ends: whether an assistant's message ends its turn or waits for a tool. Only Llama 3.1's
        formats write the difference; templates decide by themselves.
      context: retrieved text that follows a user's, after an empty line.
      learned: whether fine-tuning learns an assistant's message, or only reads it.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    ends: Literal["turn", "message"] = "turn"
    context: str = ""
    learned: bool = True

    def __post_init__(self) -> None:
        if self.role == "ipython":
            object.__setattr__(self, "role", "tool")
        if self.role not in ROLES:
            raise ChatError(f"unknown role '{self.role}'{nearest(self.role, ROLES)}")
        if self.role != "assistant" and (self.tool_calls or self.ends != "turn"):
            raise ChatError(f"a {self.role} message can't call tools; only the assistant's can")
        if self.role != "user" and self.context:
            raise ChatError(f"a {self.role} message has no context; only the user's have")


@dataclass(frozen=True)
class Encoded:
    """Ids, and for each whether the assistant wrote it: its text and the end of its turn."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)


def message_from_json(entry: Any) -> Message:
    """A message from the usual JSON forms.

    `content` may be absent, a text, or a list of text parts, which are joined. `tool_calls` are
    `{"name", "arguments"}` (or "parameters") or OpenAI's `{"function": {"name", "arguments"}}`,
    where the arguments may be JSON in a text; `function_call` is a single one. `stop_reason` may
    say `end_of_message`, and `weight` 0 that an assistant's message isn't learned.

    Raises:
      ChatError: another form; the field is named.
    """
    role = entry.get("role") if isinstance(entry, Mapping) else None
    if not isinstance(role, str):
        raise ChatError(f"a message is an object with a 'role', got {_shortened(entry)}")
    calls = entry.get("tool_calls") or []
    if not calls and entry.get("function_call"):
        calls = [entry["function_call"]]
    if not isinstance(calls, list):
        raise ChatError(f"'tool_calls' is not a list: {_shortened(calls)}")
    waits = entry.get("ends") == "message" or entry.get("stop_reason") == "end_of_message"
    return Message(
        role=_OTHER_NAMES.get(role, role),
        content=_text_of(entry.get("content")),
        tool_calls=tuple(_call_from_json(call) for call in calls),
        ends="message" if waits else "turn",
        context=_text_of(entry.get("context")),
        learned=learned_by_weight(entry),
    )


def learned_by_weight(entry: Mapping[str, Any]) -> bool:
    """What the `weight` of a message says, in OpenAI's form and in others; none is 1.

    Raises:
      ChatError: neither 0 nor 1.
    """
    weight = entry.get("weight")
    if weight not in (None, 0, 1):
        raise ChatError(f"'weight' is 0 or 1, got {_shortened(weight)}")
    return weight != 0


def messages_from_json(entries: Any) -> list[Message]:
    """Messages from a list in the usual JSON forms; see `message_from_json`.

    Raises:
      ChatError: not a list, or a message in another form, with its number from 1.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ChatError(f"messages are a list, got {_shortened(entries)}")
    messages = []
    for number, entry in enumerate(entries, 1):
        try:
            messages.append(message_from_json(entry))
        except ChatError as error:
            raise ChatError(f"message {number}: {error}") from None
    return messages


def message_to_json(message: Message) -> dict[str, Any]:
    """The plain form that `message_from_json` reads; fields that say nothing are left out."""
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        entry["tool_calls"] = [
            {"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
            for c in message.tool_calls
        ]
    if message.ends != "turn":
        entry["ends"] = message.ends
    if message.context:
        entry["context"] = message.context
    if not message.learned:
        entry["weight"] = 0
    return entry


def _text_of(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatError(f"'content' is not a text: {_shortened(content)}")
    return "".join(_text_of_part(part) for part in content)


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise ChatError(f"only text parts can be read, got {_shortened(part)}")


def _call_from_json(entry: Any) -> ToolCall:
    call = entry.get("function", entry) if isinstance(entry, Mapping) else None
    name = call.get("name", call.get("tool_name")) if isinstance(call, Mapping) else None
    if call is None or not isinstance(name, str):
        raise ChatError(f"a tool call needs a 'name', got {_shortened(entry)}")
    arguments = call.get("arguments", call.get("parameters", {}))
    if arguments in (None, ""):  # so some write that there are none
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ChatError(f"the arguments of a call of '{name}' are not an object")
    return ToolCall(name, arguments)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
