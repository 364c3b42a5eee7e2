"""Records to examples through a chat format: what is trained on, and turns dropped to fit a row.

The format says what the assistant wrote. Messages are dropped before encoding, never tokens after
it, so that no example ends in half a header or half an answer.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from llama_jax.data.examples import ROLE_NUMBERS, STRENGTH_NUMBERS, Example
from llama_jax.data.packing import permutation
from llama_jax.data.records import Conversation, Preference, RecordError, Response
from llama_jax.tokenizers import Tokenizer
from llama_jax.tokenizers.chat import ChatError, ChatFormat, Encoded, Message

Span = tuple[int, int]
Cut = Literal["end", "start", "drop"]


@dataclasses.dataclass(frozen=True)
class Made:
    """An example, and what was done to the record to make it."""

    example: Example
    turns: int  # that it holds: the user's messages
    dropped_turns: int = 0


class Encoder:
    """Makes examples of at most `seq_len` places.

    Args:
      tokenizer: the run's.
      chat: its chat format.
      seq_len: T.
      truncate: what becomes of records that are longer.
    """

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat, seq_len: int, truncate: Cut) -> None:
        self._chat, self._seq_len, self._truncate = chat, seq_len, truncate
        ends = [tokenizer.special[name] for name in chat.stop_tokens if name in tokenizer.special]
        self._ends = np.array(sorted(ends), np.int32)

    def conversation(self, record: Conversation, train_on: Literal["all", "last"]) -> Made:
        """The example of a conversation: one segment, trained on in what the assistant wrote.

        Turns that are dropped leave something to train on, so with `last` never the last ones.

        Raises:
          RecordError: too long, not to be written in this format, or nothing to be learned.
        """
        messages = _last_alone(record.messages) if train_on == "last" else record.messages
        if not any(map(_is_learned, messages)):
            raise RecordError("no_answer", "no message of the assistant that is learned")

        def encode(messages: Sequence[Message]) -> Example:
            encoded, spans = self._encoded(record, messages)
            answers = [message for message in messages if message.role == "assistant"]
            wanted = [s for s, answer in zip(spans, answers, strict=True) if answer.learned]
            return _one_segment(encoded, spans[-1][1], wanted)

        return self._fitted(messages, encode)

    def preference(
        self,
        record: Preference,
        *,
        shared_prompt: bool,
        mask_formatting: bool,
        mismatched: Response | None = None,
    ) -> Made:
        """The example of a preference: its responses, each with its prompt or behind a shared one.

        Args:
          record: the preference.
          shared_prompt: prompt once, responses in an order given by their tokens, one segment.
          mask_formatting: ends of turns and messages don't count.
          mismatched: another record's response, to add with that role.

        Raises:
          RecordError: too long, or not to be written in this format.
        """
        responses = [*record.responses, *([mismatched] if mismatched else [])]
        lay_out = _behind_one_prompt if shared_prompt else _each_with_its_prompt

        def encode(prompt: Sequence[Message]) -> Example:
            parts = [self._reply(record, prompt, r, mask_formatting) for r in responses]
            shared = self._ids(record, prompt) if shared_prompt else []
            return dataclasses.replace(
                lay_out(parts, shared),
                roles=np.array([ROLE_NUMBERS[r.role] for r in responses], np.uint8),
                pairs=np.array(
                    [(p.chosen, p.rejected, STRENGTH_NUMBERS[p.strength]) for p in record.pairs],
                    np.uint8,
                ).reshape(-1, 3),
            )

        return self._fitted(record.prompt, encode)

    def _fitted(
        self, messages: Sequence[Message], encode: Callable[[Sequence[Message]], Example]
    ) -> Made:
        """The example of all messages, or of as many whole turns as fit."""
        example = encode(messages)
        preamble, turns = _turns(messages)
        if len(example) <= self._seq_len:
            return Made(example, len(turns))
        fewest, most = 0, len(turns)  # of which so many are known to fit, and not to fit
        found: Example | None = None
        while self._truncate != "drop" and most - fewest > 1:
            count = (fewest + most) // 2
            kept = turns[:count] if self._truncate == "end" else turns[-count:]
            shorter = [*preamble, *(message for turn in kept for message in turn)]
            candidate = encode(shorter) if _answered(shorter, messages) else None
            if candidate is None or len(candidate) <= self._seq_len:
                fewest, found = count, candidate or found
            else:
                most = count
        if found is None:
            raise RecordError("too_long", f"{len(example)} tokens, {self._seq_len} fit a row")
        return Made(found, fewest, len(turns) - fewest)

    def _reply(
        self,
        record: Preference,
        prompt: Sequence[Message],
        response: Response,
        mask_formatting: bool,
    ) -> "_Reply":
        encoded, spans = self._encoded(record, [*prompt, *response.messages])
        own = spans[-sum(m.role == "assistant" for m in response.messages) :]
        ids = np.array(encoded.ids[: own[-1][1]], np.int32)
        written = _within(len(ids), own)
        counted = written & ~np.isin(ids, self._ends) if mask_formatting else written
        if not counted.any():
            raise RecordError("empty_response", "nothing of it is left to count")
        return _Reply(ids, written, counted)

    def _ids(self, record: Preference, prompt: Sequence[Message]) -> list[int]:
        try:
            return self._chat.encode(prompt, tools=record.tools).ids
        except ChatError as error:
            raise RecordError("inexpressible", str(error)) from None

    def _encoded(
        self, record: Conversation | Preference, messages: Sequence[Message]
    ) -> tuple[Encoded, list[Span]]:
        """Ids, and the span of each message of the assistant's: its text and end."""
        try:
            encoded = self._chat.encode(messages, tools=record.tools)
        except ChatError as error:
            raise RecordError("inexpressible", str(error)) from None
        spans = written_spans(encoded.mask)
        wanted = sum(message.role == "assistant" for message in messages)
        if len(spans) != wanted:
            detail = f"the {self._chat.name} format shows {len(spans)} of {wanted} answers"
            raise RecordError("inexpressible", detail)
        return encoded, spans


@dataclasses.dataclass(frozen=True)
class _Reply:
    """A conversation's ids up to its response's end, and what of them the response wrote.

    What tools returned between its messages isn't written by it: that is no part of its likelihood.
    """

    ids: np.ndarray
    written: np.ndarray
    counted: np.ndarray


def written_spans(mask: Sequence[bool]) -> list[Span]:
    """Begin and end of each stretch that the assistant wrote."""
    edges = np.diff(np.array(mask, np.int8), prepend=0, append=0)
    begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def _one_segment(encoded: Encoded, stop: int, wanted: Sequence[Span]) -> Example:
    none = np.zeros(0, np.uint8)
    return Example(
        tokens=np.array(encoded.ids[:stop], np.int32),
        segments=np.ones(stop, np.uint8),
        counts=_predicting(_within(stop, wanted)),
        responses=np.zeros(stop, np.uint8),
        roles=none,
        lasts=none.astype(np.int32),
        pairs=none.reshape(0, 3),
    )


def _each_with_its_prompt(parts: Sequence[_Reply], shared: Sequence[int]) -> Example:
    """tokens    p p r r e p p s e        (two responses, r r and s, to the prompt p p)
    segments  1 1 1 1 1 2 2 2 2
    responses 0 1 1 1 0 0 2 2 0
    """
    del shared
    lengths = [len(part.ids) for part in parts]
    numbers = np.arange(1, len(parts) + 1)
    counts = [_predicting(part.counted) for part in parts]
    responses = [
        number * _predicting(part.written) for number, part in zip(numbers, parts, strict=True)
    ]
    return _joined(
        np.concatenate([part.ids for part in parts]),
        np.repeat(numbers, lengths),
        np.concatenate(counts),
        np.concatenate(responses),
        np.cumsum(lengths) - 1,
    )


def _behind_one_prompt(parts: Sequence[_Reply], shared: Sequence[int]) -> Example:
    """tokens    p p r r e h s e          (h: the header before each response)
    segments  1 1 1 1 1 1 1 1
    responses 0 1 1 1 0 2 2 0
    """
    prompt = np.array(shared, np.int32)
    for part in parts:
        if len(part.ids) < len(prompt) or not np.array_equal(part.ids[: len(prompt)], prompt):
            raise RecordError("inexpressible", "the prompt is written otherwise with a response")
    digest = hashlib.sha256(b"/".join(part.ids.tobytes() for part in parts)).hexdigest()
    ids, counted, owners = [prompt], [np.zeros(len(prompt), bool)], [np.zeros(len(prompt), int)]
    lasts, place = np.zeros(len(parts), np.int32), len(prompt)
    for i in permutation(len(parts), digest).tolist():
        part = parts[i]
        ids.append(part.ids[len(prompt) :])
        counted.append(part.counted[len(prompt) :])
        owners.append((i + 1) * part.written[len(prompt) :])
        place += len(ids[-1])
        lasts[i] = place - 1
    tokens = np.concatenate(ids)
    owner = np.concatenate(owners)
    return _joined(
        tokens,
        np.ones(len(tokens)),
        _predicting(np.concatenate(counted)),
        np.append(owner[1:], 0),
        lasts,
    )


def _joined(
    tokens: np.ndarray,
    segments: np.ndarray,
    counts: np.ndarray,
    responses: np.ndarray,
    lasts: np.ndarray,
) -> Example:
    return Example(
        tokens=tokens,
        segments=segments.astype(np.uint8),
        counts=counts,
        responses=responses.astype(np.uint8),
        roles=np.zeros(0, np.uint8),
        lasts=lasts.astype(np.int32),
        pairs=np.zeros((0, 3), np.uint8),
    )


def _within(length: int, spans: Sequence[Span]) -> np.ndarray:
    inside = np.zeros(length, bool)
    for start, stop in spans:
        inside[start:stop] = True
    return inside


def _predicting(of_tokens: np.ndarray) -> np.ndarray:
    """What holds of each token, at the place before it, which predicts it."""
    return np.append(of_tokens[1:], False)


def _turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system message, and the turns: a user's message and all up to the next user's."""
    preamble = [message for message in messages[:1] if message.role == "system"]
    turns: list[list[Message]] = []
    for message in messages[len(preamble) :]:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return preamble, turns


def _answered(messages: Sequence[Message], all_messages: Sequence[Message]) -> bool:
    """Whether these turns, of a conversation that ends with an answer, have one to learn too."""
    return all_messages[-1].role != "assistant" or any(map(_is_learned, messages))


def _is_learned(message: Message) -> bool:
    return message.role == "assistant" and message.learned


def _last_alone(messages: Sequence[Message]) -> list[Message]:
    """The same, of which nothing is learned before the user's last message."""
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=0)
    read = (dataclasses.replace(message, learned=False) for message in messages[:last])
    return [*read, *messages[last:]]
