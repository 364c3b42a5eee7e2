"""What packing and batches ask of a collection of tokenised documents, wherever it is stored."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class DataError(ValueError):
    """Data that can't be used. `str(error)` is one line that says what and where."""


class Documents(Protocol):
    """Numbered documents of token ids, each with its end marks already in place.

    `examples.Examples` are the same with another element.
    """

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document; reading it touches no record."""
        ...

    @property
    def text_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each document was made from."""
        ...

    @property
    def fingerprint(self) -> str:
        """Differs when any token differs; positions saved in checkpoints carry it."""
        ...

    def read(self, numbers: Sequence[int]) -> Sequence[Any]:
        """The token ids of these documents (int32), or `Example`s; repeats are allowed."""
        ...


class InMemoryDocuments:
    """Documents held as arrays: small data sets and tests."""

    def __init__(
        self, documents: Sequence[Sequence[int]], text_bytes: Sequence[int] | None = None
    ) -> None:
        self._tokens = [np.asarray(document, np.int32) for document in documents]
        self.lengths = np.array([len(tokens) for tokens in self._tokens], np.int64)
        self.text_bytes = self.lengths if text_bytes is None else np.asarray(text_bytes, np.int64)
        content = hashlib.sha256(self.lengths.tobytes())
        for tokens in self._tokens:
            content.update(tokens.tobytes())
        self.fingerprint = content.hexdigest()[:16]

    def read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """The token ids of these documents."""
        return [self._tokens[number] for number in numbers]


def slots_of(documents: Documents) -> np.ndarray:
    """What each takes of the responses that a row has room for: nothing, for documents."""
    slots = getattr(documents, "slots", None)
    return np.zeros(len(documents.lengths), np.int64) if slots is None else slots


class ChainedDocuments:
    """Several collections as one: the first's documents, then the second's, and so on."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = tuple(parts)
        counts = [len(part.lengths) for part in parts]
        self._begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.lengths = np.concatenate([np.asarray(part.lengths, np.int64) for part in parts])
        self.text_bytes = np.concatenate([np.asarray(part.text_bytes) for part in parts])
        self.holds_examples = any(getattr(part, "holds_examples", False) for part in parts)
        self.slots = np.concatenate([slots_of(part) for part in parts])
        joined = "/".join(part.fingerprint for part in parts)
        self.fingerprint = hashlib.sha256(joined.encode()).hexdigest()[:16]

    def home(self, number: int) -> tuple[int, int]:
        """Which part holds the document, and its number there."""
        part = int(np.searchsorted(self._begins, number, side="right")) - 1
        return part, number - int(self._begins[part])

    def read(self, numbers: Sequence[int]) -> list[Any]:
        """These documents: one read for each part that holds any."""
        wanted = np.asarray(numbers, np.int64)
        homes = np.searchsorted(self._begins, wanted, side="right") - 1
        found: list[Any] = [None] * len(wanted)
        for home in np.unique(homes):
            places = np.flatnonzero(homes == home)
            tokens = self._parts[home].read((wanted[places] - self._begins[home]).tolist())
            for place, document in zip(places, tokens, strict=True):
                found[place] = document
        return found


class RecentDocuments:
    """Keeps the documents read last, up to a number of bytes; not for use from several threads.

    Rows are shuffled, so the rows of a long document come at different times: without this a
    book would be read and decompressed whole for each of them.
    """

    def __init__(self, documents: Documents, limit_bytes: int) -> None:
        self._documents, self._limit_bytes = documents, limit_bytes
        self._kept: dict[int, Any] = {}  # the longest unused first
        self._kept_bytes = 0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return self._documents.lengths

    @property
    def text_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text of each document."""
        return self._documents.text_bytes

    @property
    def fingerprint(self) -> str:
        """That of the documents."""
        return self._documents.fingerprint

    def read(self, numbers: Sequence[int]) -> list[Any]:
        """These documents; one read for all that aren't kept."""
        missing = sorted(set(numbers) - self._kept.keys())
        found = {number: self._kept[number] for number in numbers if number in self._kept}
        if missing:
            found |= zip(missing, self._documents.read(missing), strict=True)
        for number, tokens in found.items():
            self._keep(number, tokens)
        return [found[number] for number in numbers]

    def _keep(self, number: int, tokens: Any) -> None:
        if self._kept.pop(number, None) is None:
            self._kept_bytes += tokens.nbytes
        self._kept[number] = tokens
        while self._kept_bytes > self._limit_bytes:
            self._kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_kept_bytes": 0}
