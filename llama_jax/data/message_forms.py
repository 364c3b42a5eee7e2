"""Messages and tools out of a record's fields: OpenAI's form, ShareGPT's, and plain texts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.config.loading import nearest
from llama_jax.data.reading import type_name
from llama_jax.data.records import RecordError
from llama_jax.tokenizers.chat import (
    ChatError,
    Message,
    Tool,
    message_from_json,
    messages_from_json,
)
from llama_jax.tokenizers.chat.message import learned_by_weight
from llama_jax.tokenizers.chat.tools import tool_from_schema

# Who a ShareGPT message is `from`.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")


def openai_messages(entries: Any) -> list[Message]:
    """Messages of `role`, `content` and `tool_calls`.

    Raises:
      RecordError: not a list of those.
    """
    try:
        return messages_from_json(entries)
    except ChatError as error:
        raise RecordError("bad_message", str(error)) from None


def sharegpt_messages(entries: Any) -> list[Message]:
    """Messages of `from` and `value`; a `function_call` is JSON of `name` and `arguments`.

    Raises:
      RecordError: not a list of those.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise RecordError("bad_message", f"'conversations' is {type_name(entries)}, not a list")
    messages = []
    for number, entry in enumerate(entries, 1):
        try:
            messages.append(_sharegpt_message(entry))
        except (ChatError, RecordError) as error:
            raise RecordError("bad_message", f"message {number}: {error}") from None
    return messages


def prompt_messages(value: Any, name: str) -> list[Message]:
    """A prompt: a text, which is the user's, or messages of either form.

    Raises:
      RecordError: something else.
    """
    if isinstance(value, str):
        return [Message("user", value)]
    return any_messages(value, name)


def any_messages(value: Any, name: str) -> list[Message]:
    """Messages of whichever form.

    Raises:
      RecordError: neither.
    """
    if not isinstance(value, list):
        raise RecordError("wrong_type", f"'{name}' is {type_name(value)}, not a list of messages")
    first = value[0] if value else None
    is_sharegpt = isinstance(first, Mapping) and "from" in first
    return sharegpt_messages(value) if is_sharegpt else openai_messages(value)


def with_system(fields: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages behind that of the record's `system` field, if it has one.

    Raises:
      RecordError: no text, or two system messages.
    """
    system = fields.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise RecordError("wrong_type", f"'system' is {type_name(system)}, not a text")
    if messages and messages[0].role == "system":
        raise RecordError("bad_message", "a 'system' field and a system message")
    return [Message("system", system), *messages]


def tools_of(fields: Mapping[str, Any]) -> tuple[Tool, ...]:
    """The record's `tools` (or `functions`): JSON schemas, or texts that hold them.

    Raises:
      RecordError: something else.
    """
    given = _loaded(fields.get("tools") or fields.get("functions"))
    if not given:
        return ()
    if not isinstance(given, list):
        raise RecordError("wrong_type", f"'tools' is {type_name(given)}, not a list")
    try:
        return tuple(tool_from_schema(_loaded(tool)) for tool in given)
    except ChatError as error:
        raise RecordError("bad_message", f"'tools': {error}") from None


def _loaded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise RecordError("bad_json", f"'tools': {error}") from None


def check_messages(messages: Sequence[Message]) -> None:
    """What no conversation can be.

    Raises:
      RecordError: a message without text or calls (tools may return nothing), or a system message
        that is not the first.
    """
    for number, message in enumerate(messages, 1):
        if message.role == "system" and number > 1:
            raise RecordError("bad_message", f"message {number}: a system message stands first")
        said = message.content.strip() or message.tool_calls or message.context
        if not said and message.role != "tool":
            raise RecordError("empty_message", f"message {number}, the {message.role}'s")


def _sharegpt_message(entry: Any) -> Message:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("from"), str):
        raise RecordError("bad_message", "an object with 'from' and 'value' is wanted")
    speaker, value = entry["from"], entry.get("value")
    if speaker not in SHAREGPT_ROLES:
        known = nearest(speaker, list(SHAREGPT_ROLES))
        raise RecordError("bad_message", f"unknown speaker '{speaker}'{known}")
    if not isinstance(value, str):
        raise RecordError("bad_message", f"'value' is {type_name(value)}, not a text")
    if speaker not in _CALLS:
        return Message(SHAREGPT_ROLES[speaker], value, learned=learned_by_weight(entry))
    try:
        call = json.loads(value)
    except ValueError as error:
        raise RecordError("bad_message", f"a {speaker} that isn't JSON: {error}") from None
    calls = call if isinstance(call, list) else [call]
    weight = entry.get("weight")
    return message_from_json({"role": "assistant", "tool_calls": calls, "weight": weight})
