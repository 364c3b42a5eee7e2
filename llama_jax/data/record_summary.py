"""What a source of records came to: how many, how long, what was dropped or truncated and why."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llama_jax.data.encoding import Made
from llama_jax.data.reading import Problem

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_PROBLEMS_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of a source, as they stand in its manifest.

    Attributes:
      kind: `conversations` or `preferences`.
      examples: records kept.
      tokens, trained_tokens: sums over them; what the loss counts is trained on.
      lengths, trained_lengths, turns: `QUANTILES` over the examples, the least to the greatest.
      truncated, dropped_turns: examples that lost turns to fit a row, and how many turns.
      repeated: examples whose tokens an earlier one has.
      skipped: records left out, by reason.
      problems: the first few of each reason, with file and line.
      truncations: the first few truncated records, with file and line.
      responses, pairs: numbers by role and by strength; preferences only.
      models: how often a response of each model was chosen (or edited), and how often not.
    """

    kind: str
    examples: int
    tokens: int
    trained_tokens: int
    lengths: list[int]
    trained_lengths: list[int]
    turns: list[int]
    truncated: int
    dropped_turns: int
    repeated: int
    skipped: dict[str, int]
    problems: list[str]
    truncations: list[str]
    responses: dict[str, int] = dataclasses.field(default_factory=dict)
    pairs: dict[str, int] = dataclasses.field(default_factory=dict)
    models: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """What is printed of it."""
        yield (
            f"{self.examples:,} {self.kind}: {self.tokens:,} tokens, {self.trained_tokens:,} of"
            " them trained on"
        )
        shares = ", ".join(f"{100 * share:g}" for share in QUANTILES)
        yield f"at {shares} % of the examples:"
        for name in ("lengths", "trained_lengths", "turns"):
            values = "  ".join(f"{value:,}" for value in getattr(self, name))
            yield f"  {name.replace('_', ' ')}  {values}"
        for name in ("responses", "pairs"):
            counts = getattr(self, name)
            if counts:
                yield f"{name}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
        for model, (better, worse) in sorted(self.models.items()):
            yield f"model {model}: preferred {better:,} of {better + worse:,} times"
        if self.repeated:
            yield f"{self.repeated:,} repeat an earlier one"
        if self.truncated:
            yield f"{self.truncated:,} truncated by {self.dropped_turns:,} turns in all"
            yield from (f"truncated {place}" for place in self.truncations)
        for reason, count in self.skipped.items():
            yield f"{count:,} left out: {reason.replace('_', ' ')}"
        yield from (f"left out {problem}" for problem in self.problems)


class Tally:
    """Counts while a source is built."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._skipped: collections.Counter[str] = collections.Counter()
        self._problems: list[str] = []
        self._truncations: list[str] = []
        self._sizes: list[tuple[int, int, int, int]] = []
        self._seen: set[int] = set()
        self._repeated = 0
        self._roles: collections.Counter[str] = collections.Counter()
        self._strengths: collections.Counter[str] = collections.Counter()
        self._models: dict[str, list[int]] = {}

    def skip(self, problem: Problem) -> None:
        """A record left out."""
        self._skipped[problem.reason] += 1
        if self._skipped[problem.reason] <= _PROBLEMS_NAMED:
            self._problems.append(str(problem))

    def keep(self, made: Made, place: str) -> None:
        """A record that became an example, and where it stood."""
        example = made.example
        trained = int(np.count_nonzero(example.counts))
        self._sizes.append((len(example), trained, made.turns, made.dropped_turns))
        digest = hash(example.tokens.tobytes())
        self._repeated += digest in self._seen
        self._seen.add(digest)
        if made.dropped_turns and len(self._truncations) < _PROBLEMS_NAMED:
            self._truncations.append(f"{place}: {made.dropped_turns} turns")

    def count_responses(self, roles_and_models: Iterable[tuple[str, str]]) -> None:
        """The responses of a kept preference."""
        for role, model in roles_and_models:
            self._roles[role] += 1
            if model and role != "mismatched":
                counts = self._models.setdefault(model, [0, 0])
                counts[role == "rejected"] += 1

    def count_pairs(self, strengths: Iterable[str]) -> None:
        """The pairs of a kept preference."""
        self._strengths.update(strengths)

    def skipped(self) -> str:
        """`; left out: 2 bad_json, 1 too_long`, or nothing."""
        parts = [f"{count} {reason}" for reason, count in sorted(self._skipped.items())]
        return "; left out: " + ", ".join(parts) if parts else ""

    def first_problem(self) -> str:
        """The first problem, or nothing."""
        return f"; first: {self._problems[0]}" if self._problems else ""

    def summary(self) -> Summary:
        """The figures; there must be at least one example."""
        sizes = np.array(self._sizes, np.int64)
        lengths, trained, turns, dropped = sizes.T
        return Summary(
            kind=self._kind,
            examples=len(sizes),
            tokens=int(lengths.sum()),
            trained_tokens=int(trained.sum()),
            lengths=_quantiles(lengths),
            trained_lengths=_quantiles(trained),
            turns=_quantiles(turns),
            truncated=int(np.count_nonzero(dropped)),
            dropped_turns=int(dropped.sum()),
            repeated=self._repeated,
            skipped=dict(sorted(self._skipped.items())),
            problems=self._problems,
            truncations=self._truncations,
            responses=dict(self._roles),
            pairs=dict(self._strengths),
            models=dict(self._models),
        )


def summary_from_table(table: dict[str, Any]) -> Summary:
    """The inverse of `dataclasses.asdict`."""
    return Summary(**table)


def _quantiles(values: np.ndarray) -> list[int]:
    return [int(value) for value in np.quantile(values, QUANTILES, method="inverted_cdf")]
