"""A conversation with a model: its turns, what of them still fits, and what was said before."""

import dataclasses
import json
from collections.abc import Generator as PythonGenerator
from collections.abc import Sequence
from pathlib import Path

from llama_jax.inference.sampling import Sampling
from llama_jax.inference.sessions import Session
from llama_jax.tokenizers.chat import (
    ChatError,
    ChatFormat,
    Message,
    message_to_json,
    parse_reply,
)

_PYTHON_TAG, _END_OF_MESSAGE = "<|python_tag|>", "<|eom_id|>"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a reply ended.

    Attributes:
      reason: stop, length, or interrupted.
      stop: the token or string that ended it.
      forgotten: messages that were left out of the model's context before it, to make room.
      tokens: of the reply.
    """

    reason: str
    stop: str | None
    forgotten: int
    tokens: int


class Conversation:
    """Turns with a model. Earlier turns stay in its context while they fit.

    When they don't, the oldest exchange is left out, a question with all that answers it, never
    the system message. `messages` keeps everything that was said.

    Args:
      session: with a chat format.
      sampling: `max_new_tokens` is the most that a reply takes; the seed moves on each turn.
      system: the system message, if any.
    """

    def __init__(self, session: Session, sampling: Sampling, system: str | None = None) -> None:
        if session.chat_format is None:
            raise ChatError("a conversation needs a chat format")
        self._session, self._sampling = session, sampling
        self._chat_format: ChatFormat = session.chat_format
        self._turns = self._start = 0
        self.messages: list[Message] = []
        self.outcome: Outcome | None = None
        self.reset()
        self.system = system

    @property
    def context(self) -> list[Message]:
        """What the model is still told: the system message and the newest messages."""
        told = [] if self.system is None else [Message("system", self.system)]
        return told + self.messages[self._start :]

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages, self._start, self.outcome = [], 0, None

    def notes(self) -> list[str]:
        """What there is to say about the last reply, beside its text."""
        done, notes = self.outcome, []
        if done is None:
            return notes
        if done.forgotten:
            notes.append(f"the context is full: the {done.forgotten} oldest messages were left out")
        if done.reason == "length":
            notes.append(f"cut after {done.tokens} tokens")
        elif done.reason == "interrupted":
            notes.append("stopped" if done.tokens else "stopped; your message was taken back")
        elif done.stop == _END_OF_MESSAGE:
            notes.append("the model waits for a tool's result; this chat runs no tools")
        return notes

    def save(self, path: Path) -> int:
        """Write everything that was said as JSON lines, a message a line; the number of lines.

        Raises:
          ChatError: the file can't be written.
        """
        told = [] if self.system is None else [Message("system", self.system)]
        entries = [json.dumps(message_to_json(m), ensure_ascii=False) for m in told + self.messages]
        try:
            path.write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
        except OSError as error:
            raise ChatError(f"{path}: {error.strerror or error}") from None
        return len(entries)

    def reply(self, text: str) -> PythonGenerator[str, None, None]:
        """Say `text`; the reply's text as it comes. `outcome` then tells how it ended.

        Closing the generator early keeps what came; where nothing did, the turn is undone.

        Raises:
          ChatError: the format refuses the text, or it doesn't fit into the context by itself.
        """
        length, self.outcome = len(self.messages), None
        self.messages.append(Message("user", text))
        try:
            prompt, forgotten = self._fitting_prompt()
        except BaseException:
            del self.messages[length:]
            raise
        said, tokens = "", 0
        ended: tuple[str, str | None] = ("interrupted", None)
        try:
            for piece in self._session.generator.stream(prompt, self._turn_sampling(len(prompt))):
                said += piece.text
                tokens += len(piece.ids)
                if piece.text:
                    yield piece.text
                if piece.completion is not None:
                    stop = self._session.token_name(piece.completion.stop)
                    ended = (piece.completion.finish_reason, stop)
        finally:
            self._turns += 1
            self.outcome = Outcome(*ended, forgotten, tokens)
            if said or ended[0] != "interrupted":
                self.messages.append(_as_message(said, ended[1]))
            else:
                del self.messages[length:]

    def _fitting_prompt(self) -> tuple[list[int], int]:
        """The prompt's ids, and how many messages had to be left out for it."""
        before, limit = self._start, self._session.context_length
        # Room for a reply of some length; a long one may be cut by the end of the context.
        room = min(self._sampling.max_new_tokens, max(limit // 4, 1))
        while True:
            prompt = self._chat_format.prompt(self.context)
            if len(prompt) + room <= limit:
                return prompt, self._start - before
            start = _next_question(self.messages, self._start)
            if start is None:
                self._start = before
                raise ChatError(
                    f"the message takes {len(prompt)} tokens with all that belongs to it; the"
                    f" model's context is {limit}, of which {room} are kept for the reply"
                )
            self._start = start

    def _turn_sampling(self, prompt_length: int) -> Sampling:
        room = self._session.context_length - prompt_length
        return dataclasses.replace(
            self._sampling,
            max_new_tokens=min(self._sampling.max_new_tokens, room),
            seed=self._sampling.seed + self._turns,
        )


def _next_question(messages: Sequence[Message], start: int) -> int | None:
    """Where the exchange after that at `start` begins; None if it is the last."""
    later = range(start + 1, len(messages))
    return next((i for i in later if messages[i].role == "user"), None)


def _as_message(text: str, stop: str | None) -> Message:
    """The reply as it is read again. Calls stay text, as written, but for code's own token."""
    if text.startswith(_PYTHON_TAG):
        return parse_reply(text, stop=stop).to_message()
    return Message("assistant", text, ends="message" if stop == _END_OF_MESSAGE else "turn")
