"""Win rate: which of two models answers better, prompt by prompt, by a judge that sees no names.

The two answers are put before the judge in a random order, so that one which likes the first is
no one's advantage. A tie counts half.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, Literal, Protocol

from llama_jax.tokenizers.chat import Message

Side = Literal["first", "second", "tie"]
Winner = Literal["a", "b", "tie"]


@dataclasses.dataclass(frozen=True)
class Match:
    """Two answers to one prompt; `a` is the newer model's, `b` the one it is held against."""

    number: int
    asked: tuple[Message, ...]
    a: Message
    b: Message


class Judge(Protocol):
    """Says which of two answers is better."""

    @property
    def name(self) -> str:
        """What reports say it is."""
        ...

    def __call__(self, match: Match, first: Message, second: Message) -> Side:
        """By what was asked and the two answers alone, never by `match.a` and `match.b`."""
        ...


@dataclasses.dataclass(frozen=True)
class ScoreJudge:
    """The better-scored one; scores less than `margin` apart, or equal, are a tie."""

    score: Callable[[Sequence[Sequence[Message]]], Sequence[float]]
    name: str
    margin: float = 0.0

    def __call__(self, match: Match, first: Message, second: Message) -> Side:
        """By the scores of both."""
        one, other = self.score([[*match.asked, first], [*match.asked, second]])
        if one == other or abs(one - other) < self.margin:
            return "tie"
        return "first" if one > other else "second"


@dataclasses.dataclass(frozen=True)
class PassJudge:
    """The right one; both right or both wrong are a tie.

    Attributes:
      passes: of a match's number and an answer, whether it is right.
    """

    passes: Callable[[int, Message], bool]
    name: str

    def __call__(self, match: Match, first: Message, second: Message) -> Side:
        """By whether each passes."""
        one, other = (self.passes(match.number, answer) for answer in (first, second))
        if one == other:
            return "tie"
        return "first" if one else "second"


@dataclasses.dataclass(frozen=True)
class Decision:
    """One match: who stood first, and who won."""

    number: int
    first: Literal["a", "b"]
    winner: Winner


@dataclasses.dataclass(frozen=True)
class WinRate:
    """Matches counted from a's side."""

    wins: int
    ties: int
    losses: int

    @property
    def matches(self) -> int:
        """All of them."""
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        """Wins and half the ties, over all matches."""
        return (self.wins + self.ties / 2) / self.matches

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the rate. Ties vary less than wins, so with them it is too wide."""
        return wilson_interval(self.wins + self.ties / 2, self.matches, level)

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        low, high = self.interval()
        counts = dataclasses.asdict(self) | {"matches": self.matches}
        return counts | {"rate": self.rate, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.interval()
        return (
            f"{self.rate:.3f} ({low:.3f} to {high:.3f}): {self.wins} wins, {self.ties} ties, "
            f"{self.losses} losses"
        )


def wilson_interval(successes: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), lower and upper bound.

    Raises:
      ValueError: no trials, or successes outside them.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes:g} successes of {trials} trials")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, weight = successes / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    # At the ends the bound is 0 or 1 exactly; rounding would leave it a little beside that.
    low = 0.0 if successes == 0 else middle - half
    return low, 1.0 if successes == trials else middle + half


def judge_matches(
    matches: Sequence[Match], judge: Judge, *, seed: int = 0
) -> tuple[WinRate, list[Decision]]:
    """Every match judged once.

    Args:
      matches: at least one.
      judge: sees each match's answers as first and second.
      seed: with a match's number decides which stands first.

    Raises:
      ValueError: no matches.
    """
    if not matches:
        raise ValueError("no matches to judge")
    decisions = []
    for match in matches:
        a_first = _coin(seed, match.number)
        first, second = (match.a, match.b) if a_first else (match.b, match.a)
        side = judge(match, first, second)
        winner: Winner = "tie" if side == "tie" else "a" if (side == "first") == a_first else "b"
        decisions.append(Decision(match.number, "a" if a_first else "b", winner))
    return count(decisions), decisions


def count(decisions: Sequence[Decision]) -> WinRate:
    """Wins, ties and losses of a."""
    winners = [decision.winner for decision in decisions]
    return WinRate(winners.count("a"), winners.count("tie"), winners.count("b"))


def first_rate(decisions: Sequence[Decision]) -> float:
    """How often whoever stood first won, ties half: far from 0.5, the judge looks at the order."""
    points = [0.5 if d.winner == "tie" else float(d.winner == d.first) for d in decisions]
    return sum(points) / len(points)


def _coin(seed: int, number: int) -> bool:
    return hashlib.sha256(f"{seed} {number}".encode()).digest()[0] % 2 == 0
