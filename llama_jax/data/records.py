"""What records say, once read: conversations, prompts, and preferences between responses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_jax.config.data import STRENGTHS, Strength
from llama_jax.data.reading import Problem, Reason
from llama_jax.data.record_files import Record
from llama_jax.tokenizers.chat import Message, Tool, message_to_json

Role = Literal["chosen", "rejected", "edited", "mismatched"]


class RecordError(ValueError):
    """A record that can't be used."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail

    def problem(self, record: "Record | Conversation | Preference | Prompt") -> Problem:
        """The same with the place of the record."""
        return Problem(record.file, record.line, self.reason, self.detail)


@dataclass(frozen=True)
class Conversation:
    """Messages, with at least one by the assistant, and the tools that it was told of."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    file: str = ""
    line: int = 0


@dataclass(frozen=True)
class Prompt:
    """What a model is to reply to.

    Attributes:
      messages, tools: the conversation so far.
      reference: the answer that is known to be right, if any.
      tests: code that a right answer passes, if any.
      metadata: every other field of the record.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    reference: str | None = None
    tests: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    line: int = 0


@dataclass(frozen=True)
class Response:
    """What an assistant wrote in reply (several messages where it called tools), and which."""

    messages: tuple[Message, ...]
    role: Role
    model: str = ""

    @property
    def content(self) -> tuple[Any, ...]:
        """What makes two responses identical: texts without white space around them, and calls."""
        return tuple(
            (message.role, message.content.strip(), repr(message.tool_calls))
            for message in self.messages
        )


@dataclass(frozen=True)
class Pair:
    """Response `chosen` was preferred to `rejected`; both counted from 1."""

    chosen: int
    rejected: int
    strength: Strength


@dataclass(frozen=True)
class Preference:
    """Responses to one prompt, best first and an edited one last, and every pair of them.

    A single response is a preference without a pair: chosen where it is desirable, else rejected.
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    pairs: tuple[Pair, ...]
    tools: tuple[Tool, ...] = ()
    file: str = ""
    line: int = 0

    @property
    def best(self) -> Response:
        """The edited response, else the first one; its role says whether it is any good."""
        return next((r for r in self.responses if r.role == "edited"), self.responses[0])


def ranked(responses: Sequence[Response], steps: Sequence[Strength]) -> tuple[Pair, ...]:
    """The pairs of responses, best first; an edited one stands last and is better than all.

    Edited > chosen > rejected as in the Llama 3 paper (arXiv 2407.21783, section 4.2.1). An edit is
    "better" than what it was made from and "significantly" better than the rest.

    Args:
      responses: those that were ranked.
      steps: by how much each of those is better than the next; over several steps the strongest
        of them counts.
    """
    count = len(steps) + 1
    pairs = [
        Pair(i + 1, j + 1, min(steps[i:j], key=STRENGTHS.index))
        for i in range(count)
        for j in range(i + 1, count)
    ]
    if len(responses) > count:
        pairs.append(Pair(count + 1, 1, "better"))
        pairs += [Pair(count + 1, i + 1, "significantly") for i in range(1, count)]
    return tuple(pairs)


def preference_to_json(preference: Preference) -> dict[str, Any]:
    """The plain form of a record, which `preferences` reads."""
    tools = [tool.to_schema() for tool in preference.tools]
    with_tools: dict[str, Any] = {"tools": tools} if tools else {}
    prompt = [message_to_json(message) for message in preference.prompt]
    if len(preference.responses) == 1:
        (one,) = preference.responses
        label = one.role != "rejected"
        return {"prompt": prompt, "completion": _to_json(one), "label": label, **with_tools}
    ranking = [r for r in preference.responses if r.role != "edited"]
    edited = [_to_json(r) for r in preference.responses if r.role == "edited"]
    by_pair = {(pair.chosen, pair.rejected): pair.strength for pair in preference.pairs}
    table: dict[str, Any] = {
        "prompt": prompt,
        "responses": [_to_json(response) for response in ranking],
        "ranking": list(range(len(ranking))),
        "strength": [by_pair[i, i + 1] for i in range(1, len(ranking))],
    }
    if edited:
        table["edited"] = edited[0]
    return {**table, **with_tools}


def conversation_to_json(conversation: Conversation) -> dict[str, Any]:
    """The plain form of a record: OpenAI's `messages`, with `tools` where there are any."""
    table: dict[str, Any] = {"messages": [message_to_json(m) for m in conversation.messages]}
    if conversation.tools:
        table["tools"] = [tool.to_schema() for tool in conversation.tools]
    return table


def _to_json(response: Response) -> dict[str, Any]:
    table: dict[str, Any] = {"messages": [message_to_json(m) for m in response.messages]}
    return {**table, "model": response.model} if response.model else table
