"""Conversations and prompts out of records' fields, by the form of each record."""

from collections.abc import Mapping
from typing import Any

from llama_jax.config.data import ConversationsConfig, PromptsConfig
from llama_jax.config.loading import nearest
from llama_jax.data.message_forms import (
    any_messages,
    check_messages,
    openai_messages,
    prompt_messages,
    sharegpt_messages,
    tools_of,
    with_system,
)
from llama_jax.data.preferences import is_preference, is_unpaired, to_preference
from llama_jax.data.reading import type_name
from llama_jax.data.record_files import Record
from llama_jax.data.records import Conversation, Prompt, RecordError
from llama_jax.tokenizers.chat import Message


def to_conversation(record: Record, config: ConversationsConfig) -> Conversation:
    """The conversation of a record.

    Messages after the assistant's last are left away: nothing is learned from them.

    Raises:
      RecordError: what is wrong with it.
    """
    form = _form_of(record.fields, config) if config.form == "auto" else config.form
    if form == "preferences":
        return _preferred(record, config)
    labelled = config.form == "auto" and form == "completion" and is_unpaired(record.fields)
    if labelled and record.fields["label"] is False:
        raise RecordError("undesirable", "its label is false")
    messages = with_system(record.fields, _messages(record.fields, form, config))
    check_messages(messages)
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=None)
    if last is None:
        raise RecordError("no_answer", "no message of the assistant")
    answered = tuple(messages[: last + 1])
    return Conversation(answered, tools_of(record.fields), record.file, record.line)


def to_prompt(record: Record, config: PromptsConfig) -> Prompt:
    """The prompt of a record.

    `messages` or `conversations` that end with an answer give it as the reference.

    Raises:
      RecordError: what is wrong with it.
    """
    fields, names = record.fields, (config.prompt_field, "messages", "conversations")
    name = next((name for name in names if name in fields), None)
    if name is None:
        known = nearest(config.prompt_field, list(fields))
        raise RecordError("missing_field", f"no '{config.prompt_field}'{known}")
    messages = with_system(fields, prompt_messages(fields[name], name))
    check_messages(messages)
    reference = _text(fields, config.answer_field)
    if messages and messages[-1].role == "assistant":
        reference = messages.pop().content if reference is None else reference
    if not messages or messages[-1].role not in ("user", "tool"):
        raise RecordError("bad_message", "a prompt ends with the user's message or a tool's")
    read = {name, "system", "tools", "functions", config.answer_field, config.tests_field}
    return Prompt(
        tuple(messages),
        tools_of(fields),
        reference,
        _tests(fields, config.tests_field),
        {key: value for key, value in fields.items() if key not in read},
        record.file,
        record.line,
    )


def _form_of(fields: Mapping[str, Any], config: ConversationsConfig) -> str:
    if is_preference(fields):
        return "preferences"
    if "messages" in fields:
        return "openai"
    if "conversations" in fields:
        return "sharegpt"
    if {config.prompt_field, config.completion_field} <= fields.keys():
        return "completion"
    raise RecordError(
        "unknown_form",
        f"it has {', '.join(sorted(fields)) or 'no field'}; wanted are messages, conversations,"
        f" {config.prompt_field} with {config.completion_field}, or responses",
    )


def _messages(fields: Mapping[str, Any], form: str, config: ConversationsConfig) -> list[Message]:
    if form == "completion":
        return _completion(fields, config)
    name = {"openai": "messages", "sharegpt": "conversations"}[form]
    if name not in fields:
        raise RecordError("missing_field", f"no '{name}'{nearest(name, list(fields))}")
    if form == "openai":
        return openai_messages(fields[name])
    entries = fields[name]
    # Many data sets call OpenAI's form `conversations`; told by the messages themselves.
    named = isinstance(entries, list) and entries and isinstance(entries[0], Mapping)
    if config.form == "auto" and named and "role" in entries[0]:
        return openai_messages(entries)
    return sharegpt_messages(entries)


def _completion(fields: Mapping[str, Any], config: ConversationsConfig) -> list[Message]:
    for name in (config.prompt_field, config.completion_field):
        if name not in fields:
            raise RecordError("missing_field", f"no '{name}'{nearest(name, list(fields))}")
    answer = fields[config.completion_field]
    replies = (
        [Message("assistant", answer)]
        if isinstance(answer, str)
        else any_messages(answer, config.completion_field)
    )
    return [*prompt_messages(fields[config.prompt_field], config.prompt_field), *replies]


def _preferred(record: Record, config: ConversationsConfig) -> Conversation:
    preference = to_preference(record, strength="better")
    best = preference.best
    if config.preferred == "edited" and best.role != "edited":
        raise RecordError("not_edited", "no edited response")
    if best.role == "rejected":
        raise RecordError("undesirable", "its label is false")
    messages = (*preference.prompt, *best.messages)
    return Conversation(messages, preference.tools, record.file, record.line)


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RecordError("wrong_type", f"'{name}' is {type_name(value)}, not a text")


def _tests(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name) or []
    tests = [value] if isinstance(value, str) else value
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise RecordError("wrong_type", f"'{name}' is {type_name(value)}, not texts")
    return tuple(tests)
