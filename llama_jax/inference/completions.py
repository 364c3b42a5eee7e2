"""What came of a request: completions, the pieces of a stream, and when a row is finished."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from llama_jax.inference.sampler import IDLE, NO_TOKEN
from llama_jax.inference.sampling import Sampling
from llama_jax.tokenizers import StreamDecoder, Tokenizer


class InferenceError(ValueError):
    """Generation that can't go on. `str(error)` is one line."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation of one prompt.

    Attributes:
      ids: without the stop id. Where a stop string ended it, up to the token that completed the
        string; later ones are dropped.
      text: of `ids`, as it goes on from the prompt; ends before a stop string.
      finish_reason: `length` after `max_new_tokens` tokens, else `stop`.
      stop: the stop id or string that ended it.
      logprobs: of `ids`, under the model's own distribution, where they were asked for.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    stop: int | str | None
    logprobs: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a stream gives at once: text that became valid, and the ids since the last piece.

    The last piece carries the completion, whose text and ids are those of all pieces joined.
    """

    text: str
    ids: tuple[int, ...]
    completion: Completion | None = None


class StopStrings:
    """Text in, text out, held back while it could be the beginning of a stop string."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._held = strings, ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What can be given out; `found` is set once a string is whole, and text ends before it."""
        text = self._held + text
        # Of several that are whole now, the one that begins first, then the one named first.
        hits = [(text.find(string), number) for number, string in enumerate(self._strings)]
        hits = [hit for hit in hits if hit[0] >= 0]
        if hits:
            start, number = min(hits)
            self.found, self._held = self._strings[number], ""
            return text[:start]
        held = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """How many of the text's last characters could begin the string."""
    longest = min(len(string) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


class Row:
    """One completion as it comes: takes tokens, gives text, and says when it is finished."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, tokenizer: Tokenizer) -> None:
        self._prompt, self._sampling = tuple(prompt), sampling
        self._decoder = StreamDecoder(tokenizer, prompt)
        self._stops = StopStrings(sampling.stop_strings)
        # Tokens taken so far, without the stop id.
        self.ids: list[int] = []
        self._logprobs: list[float] = []
        self._texts: list[str] = []
        self.completion: Completion | None = None

    def take_all(self, tokens_C: np.ndarray, logprobs_C: np.ndarray) -> str:
        """The text that these tokens make valid; `completion` is set once the row is finished.

        Tokens after the end are dropped; `IDLE` is none.

        Raises:
          InferenceError: the model's logits were no numbers.
        """
        text = ""
        for token, logprob in zip(tokens_C.tolist(), logprobs_C.tolist(), strict=True):
            if self.completion is None and token != IDLE:
                text += self._take(token, logprob)
        return text

    def _take(self, token: int, logprob: float) -> str:
        if token == NO_TOKEN:
            raise InferenceError(
                f"the model's logits after {len(self._prompt) + len(self.ids)} tokens hold NaN or "
                "infinity; are its weights whole?"
            )
        if token in self._sampling.stop_ids:
            return self._finish("stop", token)
        self.ids.append(token)
        self._logprobs.append(logprob)
        text = self._give(self._stops.push(self._decoder.push(token)))
        if self._stops.found is not None:
            self._complete("stop", self._stops.found)
        elif len(self.ids) == self._sampling.max_new_tokens:
            text += self._finish("length", None)
        return text

    def _finish(self, reason: Literal["stop", "length"], stop: int | None) -> str:
        text = self._give(self._stops.push(self._decoder.finish()))
        if self._stops.found is not None:
            self._complete("stop", self._stops.found)
            return text
        text += self._give(self._stops.finish())
        self._complete(reason, stop)
        return text

    def _give(self, text: str) -> str:
        self._texts.append(text)
        return text

    def _complete(self, reason: Literal["stop", "length"], stop: int | str | None) -> None:
        logprobs = tuple(self._logprobs) if self._sampling.logprobs else None
        text = "".join(self._texts)
        self.completion = Completion(self._prompt, tuple(self.ids), text, reason, stop, logprobs)
