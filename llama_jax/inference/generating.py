"""Many requests through one model: prompts encoded and checked, answered batch by batch."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from llama_jax.config.loading import ConfigError
from llama_jax.inference.generator import Completion, Piece
from llama_jax.inference.requests import (
    Request,
    as_conversation,
    encode_request,
    is_conversation,
)
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.sampling_choice import Wishes, choose_sampling, choose_stop_ids
from llama_jax.inference.sessions import Session
from llama_jax.tokenizers.chat import message_to_json, parse_reply

# Taken where no length is asked for and the context has room for it.
DEFAULT_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Answer:
    """One completion of one request."""

    request: Request
    completion: Completion
    session: Session

    def to_json(self) -> dict[str, Any]:
        """The fields of a JSON line; `logprobs` where there are, `message` in a conversation."""
        done = self.completion
        entry = {
            "prompt_ids": list(done.prompt_ids),
            "ids": list(done.ids),
            "text": done.text,
            "finish_reason": done.finish_reason,
            "stop": done.stop,
        }
        if done.logprobs is not None:
            entry["logprobs"] = list(done.logprobs)
        if is_conversation(self.request):
            reply = parse_reply(done.text, stop=self.session.token_name(done.stop))
            entry["message"] = message_to_json(reply.to_message())
        return entry

    def token_texts(self) -> list[str]:
        """Each token's own text; half a character shows as U+FFFD."""
        return [self.session.tokenizer.decode([i]) for i in self.completion.ids]


@dataclasses.dataclass(frozen=True)
class Task:
    """Requests with their prompts' ids, ready to be answered."""

    session: Session
    requests: Sequence[Request]
    prompts: Sequence[Sequence[int]]
    sampling: Sampling

    def answers(self, *, n: int, batch_size: int) -> Iterator[Answer]:
        """`n` completions of each request, in order; told when `batch_size` are done."""
        size = max(batch_size // n, 1)
        for start in range(0, len(self.prompts), size):
            stop = start + size
            rows = self.session.generator.generate(self.prompts[start:stop], self.sampling, n=n)
            for request, row in zip(self.requests[start:stop], rows, strict=True):
                for completion in row:
                    yield Answer(request, completion, self.session)

    def stream(self) -> Iterator[Piece]:
        """The first request's completion as it comes."""
        return self.session.generator.stream(self.prompts[0], self.sampling)


def make_task(
    session: Session,
    requests: Sequence[Request],
    wishes: Wishes,
    *,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int | None = None,
) -> Task:
    """Encode and check everything before anything is generated.

    Args:
      session: with a chat format, where there are conversations.
      requests: what to answer.
      wishes: how to draw.
      chat: take prompts as a user's messages.
      system: the system message of each conversation.
      max_new_tokens: by default `DEFAULT_NEW_TOKENS`, or what the context leaves.

    Raises:
      ConfigError: a prompt that is empty or leaves no room, a sampling value out of range.
      ChatError: a conversation that the format can't express.
    """
    chosen = [as_conversation(r, system) if chat or is_conversation(r) else r for r in requests]
    prompts = [encode_request(r, session.tokenizer, session.chat_format) for r in chosen]
    for number, ids in enumerate(prompts, 1):
        _check(ids, number, session.context_length)
    if max_new_tokens is None:
        room = session.context_length - max(map(len, prompts))
        max_new_tokens = min(DEFAULT_NEW_TOKENS, room)
    defaults = session.source.generation
    conversing = any(map(is_conversation, chosen))
    chat_format = session.chat_format if conversing else None
    stop_ids = choose_stop_ids(session.tokenizer, defaults, chat_format)
    sampling = choose_sampling(
        wishes, defaults, stop_ids=stop_ids, max_new_tokens=max_new_tokens
    )  # fmt: skip
    return Task(session, chosen, prompts, sampling)


def _check(ids: Sequence[int], number: int, context_length: int) -> None:
    if not ids:
        raise ConfigError(f"prompt {number} has no tokens, and this model's have no begin token")
    if len(ids) >= context_length:
        raise ConfigError(
            f"prompt {number} has {len(ids)} tokens; the model's context is {context_length}"
        )
