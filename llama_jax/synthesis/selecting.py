"""Which samples are kept: the best of each prompt, and a pair of which one is better.

A pure function of the two journals, so a kill while it writes loses nothing: it is done again.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_jax.config.loading import ConfigError
from llama_jax.synthesis.journal import write_lines
from llama_jax.synthesis.prompts import Prompt, SynthesisError
from llama_jax.synthesis.records import (
    Ranked,
    Strength,
    conversation_record,
    preference_record,
    same_text,
    says_nothing,
    strength_of,
)
from llama_jax.synthesis.scoring import read_samples, read_scores
from llama_jax.synthesis.yields import accuracy_of_best, best_of, pass_at

Pairs = Literal["right_wrong", "best_worst", "none"]


@dataclasses.dataclass(frozen=True)
class Keeping:
    """What may be kept.

    Attributes:
      pairs: of what preferences are made: the best right answer and the worst wrong one, or the
        best and the worst score; None takes the first where there are verdicts.
      min_score: the best answer is kept from this score on.
      truncated: keep answers that were cut at their most tokens; as a target they would teach to
        end in the middle.
    """

    pairs: Pairs | None = None
    min_score: float | None = None
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Judged:
    """All samples of one prompt with what is known of them.

    Attributes:
      record: of the samples' journal.
      scores: one a sample, or None.
      verdicts: each sample's, by verifier.
    """

    record: Mapping[str, Any]
    scores: Sequence[float] | None
    verdicts: Sequence[Mapping[str, Any]]

    @property
    def responses(self) -> Sequence[Mapping[str, Any]]:
        """The samples."""
        return self.record["responses"]

    @property
    def verified(self) -> bool:
        """Whether there are verdicts at all."""
        return any(self.verdicts)

    def right(self, k: int) -> bool:
        """Whether all verdicts on sample k passed; True where there are none."""
        return all(verdict["passed"] for verdict in self.verdicts[k].values())

    def by_score(self, numbers: Sequence[int]) -> list[int]:
        """Those samples, best first; equals, and all where there is no score, in their order."""
        scores = self.scores
        return list(numbers) if scores is None else sorted(numbers, key=lambda k: -scores[k])


@dataclasses.dataclass(frozen=True)
class Selection:
    """What was made: how many lines of each file, and the figures of `summary.json`."""

    kept: int
    pairs: int
    figures: Mapping[str, Any]


def read_judged(
    samples: Path, scores: Path | None, prompts: Sequence[Prompt]
) -> tuple[dict[str, Any], list[Judged]]:
    """The header of the samples, and every prompt's samples with their scores and verdicts.

    Args:
      scores: None where nothing was scored: all samples are as good as the first.

    Raises:
      SynthesisError: a journal that isn't whole, or scores of other samples.
    """
    header, records = read_samples(samples, prompts)
    if scores is None:
        return header, [Judged(r, None, [{} for _ in r["responses"]]) for r in records]
    about, judged = read_scores(scores, prompts)
    if about["samples"] != header:
        raise SynthesisError(f"{scores}: are scores of other samples than {samples}")
    pairs = zip(records, judged, strict=True)
    return header, [Judged(r, j["scores"], j["verdicts"]) for r, j in pairs]


def select(
    samples: Path,
    scores: Path | None,
    prompts: Sequence[Prompt],
    *,
    conversations: Path,
    preferences: Path,
    keeping: Keeping = Keeping(),
) -> Selection:
    """Write the best answers as conversations and a pair of each prompt as preferences.

    Raises:
      ConfigError: nothing to choose by, or a rule that needs what wasn't made.
      SynthesisError: as `read_judged`.
    """
    header, judged = read_judged(samples, scores, prompts)
    pairs = _checked(keeping, header, judged)
    best = {each.record["prompt"]: best_sample(each, keeping) for each in judged}
    kept = write_lines(conversations, _conversations(header, judged, best))
    made = write_lines(preferences, _preferences(header, judged, keeping, pairs))
    return Selection(kept, made, {"kept": kept, "pairs": made, **summarise(header, judged)})


def best_sample(judged: Judged, keeping: Keeping = Keeping()) -> int | None:
    """The best-scored of the right ones that may be kept; None where there is none."""
    able = [k for k in _usable(judged, keeping) if judged.right(k)]
    ordered = judged.by_score(able)
    if not ordered:
        return None
    scores, least = judged.scores, keeping.min_score
    return None if scores and least is not None and scores[ordered[0]] < least else ordered[0]


def provenance_of(header: Mapping[str, Any], judged: Judged, **more: Any) -> dict[str, Any]:
    """How the samples of a prompt came about, with every score and verdict."""
    return {
        "prompt": judged.record["prompt"],
        "model": header["model"],
        "sampling": header["sampling"],
        "k": header["k"],
        **more,
        "scores": judged.scores,
        "verdicts": list(judged.verdicts) if judged.verified else None,
    }


def summarise(header: Mapping[str, Any], judged: Sequence[Judged]) -> dict[str, Any]:
    """Rewards and right answers by K, and how long the samples are.

    `scores.best_of` and `right.pass_at` have k = 1 to K; see `yields`. `right.best_of` is the share
    of right answers among the best-scored of k.
    """
    responses = [response for each in judged for response in each.responses]
    figures: dict[str, Any] = {
        "prompts": len(judged),
        "k": header["k"],
        "samples": len(responses),
        "truncated": sum(r["finish_reason"] == "length" for r in responses),
        "mean_tokens": float(np.mean([r["tokens"] for r in responses])),
    }
    scores_PK = None
    if judged[0].scores is not None:
        scores_PK = np.array([each.scores for each in judged], np.float64)
        figures["scores"] = {"mean": float(scores_PK.mean()), "best_of": best_of(scores_PK)}
    if judged[0].verified:
        right_PK = np.array([[each.right(k) for k in range(header["k"])] for each in judged])
        figures["right"] = {"mean": float(right_PK.mean()), "pass_at": pass_at(right_PK)}
        if scores_PK is not None:
            figures["right"]["best_of"] = accuracy_of_best(scores_PK, right_PK)
    return figures


def _checked(keeping: Keeping, header: Mapping[str, Any], judged: Sequence[Judged]) -> Pairs:
    if not judged:
        raise ConfigError("no prompts", key="prompts")
    scored, verified = judged[0].scores is not None, judged[0].verified
    if header["k"] > 1 and not scored and not verified:
        raise ConfigError(
            f"{header['k']} samples of a prompt, but no reward model and no verifier to choose by"
        )
    if keeping.min_score is not None and not scored:
        raise ConfigError("nothing was scored", key="min_score")
    pairs = keeping.pairs
    if pairs is None:
        return "right_wrong" if verified else "best_worst" if scored else "none"
    if pairs == "right_wrong" and not verified:
        raise ConfigError("'right_wrong' needs a verifier", key="pairs")
    if pairs == "best_worst" and not scored:
        raise ConfigError("'best_worst' needs a reward model", key="pairs")
    return pairs


def _usable(judged: Judged, keeping: Keeping) -> list[int]:
    responses = judged.responses
    return [
        k
        for k in range(len(responses))
        if not says_nothing(responses[k]["message"])
        and (keeping.truncated or responses[k]["finish_reason"] != "length")
    ]


def _conversations(
    header: Mapping[str, Any], judged: Sequence[Judged], best: Mapping[int, int | None]
) -> Iterator[dict[str, Any]]:
    for each in judged:
        k = best[each.record["prompt"]]
        if k is not None:
            message = each.responses[k]["message"]
            yield conversation_record(each.record, message, provenance_of(header, each, kept=k))


def _preferences(
    header: Mapping[str, Any], judged: Sequence[Judged], keeping: Keeping, pairs: Pairs
) -> Iterator[dict[str, Any]]:
    for each in judged:
        pair = None if pairs == "none" else pair_of(each, keeping, pairs)
        if pair is not None:
            chosen, rejected = (_ranked(header, each, k) for k in pair)
            strength = pair_strength(each, *pair)
            about = provenance_of(header, each, chosen=pair[0], rejected=pair[1])
            yield preference_record(each.record, chosen, rejected, strength, about)


def pair_of(judged: Judged, keeping: Keeping, pairs: Pairs) -> tuple[int, int] | None:
    """Numbers of the chosen and the rejected sample; None where they don't differ."""
    usable = _usable(judged, keeping)
    right = judged.by_score([k for k in usable if judged.right(k)])
    if pairs == "right_wrong":
        # A wrong answer may be one that was cut: it is told apart by what it is.
        able = _usable(judged, dataclasses.replace(keeping, truncated=True))
        wrong = judged.by_score([k for k in able if not judged.right(k)])
        return (right[0], wrong[-1]) if right and wrong else None
    # A right answer stands over every wrong one, whatever their scores.
    ordered = right + judged.by_score([k for k in usable if not judged.right(k)])
    if len(ordered) < 2:
        return None
    best, worst = ordered[0], ordered[-1]
    messages = judged.responses[best]["message"], judged.responses[worst]["message"]
    return None if _equal(judged, best, worst) or same_text(*messages) else (best, worst)


def _equal(judged: Judged, one: int, other: int) -> bool:
    scores = judged.scores
    assert scores is not None
    return scores[one] == scores[other] and judged.right(one) == judged.right(other)


def pair_strength(judged: Judged, chosen: int, rejected: int) -> Strength:
    """By right and wrong, else by the scores, "marginally" where there are none."""
    if judged.right(chosen) and not judged.right(rejected):
        return "significantly"
    if judged.scores is None:
        return "marginally"
    return strength_of(judged.scores[chosen] - judged.scores[rejected])


def _ranked(header: Mapping[str, Any], judged: Judged, k: int) -> Ranked:
    return Ranked(judged.responses[k]["message"], header["model"]["path"])
