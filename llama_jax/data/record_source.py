"""A source of records as a stream: its files in order, the part asked for, a limit.

A record falls into the same part as all others that ask the same: by the first user's text.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from llama_jax.config.data import (
    ConversationsConfig,
    PreferencesConfig,
    PromptsConfig,
    RecordsConfig,
)
from llama_jax.data.conversations import to_conversation, to_prompt
from llama_jax.data.files import in_part
from llama_jax.data.preferences import to_preference
from llama_jax.data.reading import Problem
from llama_jax.data.record_files import Record, read_records, record_files
from llama_jax.data.records import Conversation, Preference, Prompt, RecordError
from llama_jax.tokenizers.chat import Message

Parsed = TypeVar("Parsed", Conversation, Prompt, Preference)
OnBytes = Callable[[int], None]


def _ignored(size: int) -> None:
    del size


def read_conversations(
    config: ConversationsConfig, on_bytes: OnBytes = _ignored
) -> Iterator[Conversation | Problem]:
    """The conversations of a source, and what is wrong with the records that hold none.

    Args:
      config: the source.
      on_bytes: told about bytes read, for progress.

    Raises:
      ConfigError: no file at the source's path.
    """
    return _read(config, lambda r: to_conversation(r, config), lambda c: c.messages, on_bytes)


def read_prompts(config: PromptsConfig, on_bytes: OnBytes = _ignored) -> Iterator[Prompt | Problem]:
    """The prompts of a source; arguments and errors as `read_conversations`."""
    return _read(config, lambda r: to_prompt(r, config), lambda p: p.messages, on_bytes)


def read_preferences(
    config: PreferencesConfig, on_bytes: OnBytes = _ignored
) -> Iterator[Preference | Problem]:
    """The preferences of a source, of all strengths; arguments and errors as above."""
    strength = config.strength
    return _read(
        config, lambda r: to_preference(r, strength=strength), lambda p: p.prompt, on_bytes
    )


def _read(
    config: RecordsConfig,
    parse: Callable[[Record], Parsed],
    messages_of: Callable[[Parsed], Sequence[Message]],
    on_bytes: OnBytes,
) -> Iterator[Parsed | Problem]:
    taken = 0
    for file in record_files(config.path):
        for record in read_records(file, on_bytes):
            if isinstance(record, Problem):
                yield record
                continue
            try:
                parsed = parse(record)
            except RecordError as error:
                yield error.problem(record)
                continue
            if in_part(_asked(messages_of(parsed)), config):
                yield parsed
                taken += 1
                if taken == config.max_records:
                    return


def _asked(messages: Sequence[Message]) -> str:
    return next((m.content for m in messages if m.role == "user"), messages[0].content)
