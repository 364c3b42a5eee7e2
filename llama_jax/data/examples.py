"""Examples: what is packed into rows whole. Tokens, which of them are predicted, for whom.

An example of one conversation, or of all responses to one prompt. Places of it count from 0, its
segments and responses from 1; a place predicts the next token of its segment.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from llama_jax.data.documents import DataError

# What a preference's loss is taken on: the responses' tokens (DPO and its kin), or the one place
# that has read all of a response (reward models).
LossOn = Literal["responses", "last"]
LOSS_OF_OBJECTIVE: dict[str, LossOn] = {"reward": "last", "dpo": "responses"}
ROLE_NUMBERS = {"chosen": 1, "rejected": 2, "edited": 3, "mismatched": 4}
STRENGTH_NUMBERS = {"significantly": 3, "better": 2, "slightly": 1, "marginally": 0}


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One example of n places.

    Attributes:
      tokens: int32 [n].
      segments: uint8 [n], increasing.
      counts: bool [n], whether the loss counts what the place predicts.
      responses: uint8 [n], the response of the token that the place predicts, 0 for none.
      roles: uint8 [r], of each response; see `ROLE_NUMBERS`. Nothing for conversations.
      lasts: int32 [r], the place of each response's last token.
      pairs: uint8 [p, 3], chosen and rejected response and the strength of each pair.
      reference_logps: float32 [r], summed log-probability of each response, where it is known.
      teacher_ids, teacher_logps: int32 and float32 [n, C], a teacher's likeliest tokens after each
        place, where they are stored.
    """

    tokens: np.ndarray
    segments: np.ndarray
    counts: np.ndarray
    responses: np.ndarray
    roles: np.ndarray
    lasts: np.ndarray
    pairs: np.ndarray
    reference_logps: np.ndarray | None = None
    teacher_ids: np.ndarray | None = None
    teacher_logps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(array.nbytes for array in fields if array is not None)

    def trained_on(self, loss_on: LossOn) -> "Example":
        """With the places that this loss reads."""
        if loss_on == "responses" or not len(self.roles):
            return self
        counts, responses = np.zeros_like(self.counts), self.responses.copy()
        counts[self.lasts] = True
        responses[self.lasts] = np.arange(1, len(self.roles) + 1)
        return dataclasses.replace(self, counts=counts, responses=responses)

    def to_bytes(self) -> bytes:
        """What is stored: sizes, then the fields one after the other."""
        sizes = np.array([len(self.tokens), len(self.roles), len(self.pairs)], "<i4")
        fields = (
            self.tokens.astype("<i4"),
            self.lasts.astype("<i4"),
            self.segments.astype("u1"),
            self.counts.astype("u1"),
            self.responses.astype("u1"),
            self.roles.astype("u1"),
            self.pairs.astype("u1"),
        )
        return b"".join(array.tobytes() for array in (sizes, *fields))


def example_from_bytes(data: bytes) -> Example:
    """The inverse of `Example.to_bytes`.

    Raises:
      DataError: not as many bytes as its sizes say.
    """
    n, r, p = (int(size) for size in np.frombuffer(data, "<i4", 3))
    if len(data) != 12 + 4 * (n + r) + 3 * n + r + 3 * p:
        raise DataError(f"a stored example of {len(data)} bytes says it has {n} tokens")
    words = np.frombuffer(data, "<i4", n + r, offset=12)
    octets = np.frombuffer(data, "u1", offset=12 + 4 * (n + r))
    segments, counts, responses, roles, pairs = np.split(octets, [n, 2 * n, 3 * n, 3 * n + r])
    return Example(
        words[:n],
        segments,
        counts.astype(bool),
        responses,
        roles,
        words[n:],
        pairs.reshape(p, 3),
    )


def from_document(tokens: np.ndarray) -> Example:
    """A document of text: everything but its first token is predicted."""
    n = len(tokens)
    counts = np.arange(n) < n - 1
    none = np.zeros(0, np.uint8)
    ones, zeros = np.ones(n, np.uint8), np.zeros(n, np.uint8)
    return Example(tokens, ones, counts, zeros, none, none.astype(np.int32), none.reshape(0, 3))


class Examples(Protocol):
    """Numbered examples, wherever they are stored; `documents.Documents` of another element."""

    @property
    def lengths(self) -> np.ndarray:
        """Places of each example."""
        ...

    @property
    def text_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that the targets of each stand for."""
        ...

    @property
    def fingerprint(self) -> str:
        """Differs when any batch made of them would."""
        ...

    @property
    def slots(self) -> np.ndarray:
        """Responses, or pairs where these are more, of each example: its share of a row's R."""
        ...

    @property
    def response_counts(self) -> np.ndarray:
        """Responses of each example."""
        ...

    def read(self, numbers: Sequence[int]) -> list[Example]:
        """These examples, in this order; repeats are allowed."""
        ...
