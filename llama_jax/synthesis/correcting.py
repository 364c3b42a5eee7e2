"""Corrected answers: which prompts need one, when one is kept, and what becomes of it.

Where all answers to a prompt are poor, the best of them is corrected, by a model (`critic`) or a
person (`edits`). What was corrected is verified like any answer, and becomes a conversation for SFT
and an edited preference: edited over chosen over rejected (Llama 3, section 4.2.1). In the folder
`critic`, beside the samples:

samples.jsonl, scores.jsonl   what a critic wrote      conversations.jsonl, preferences.jsonl
summary.json                  how many were poor, how many corrected, why the others weren't
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config.loading import ConfigError
from llama_jax.synthesis.journal import write_lines
from llama_jax.synthesis.prompts import Prompt
from llama_jax.synthesis.records import (
    Ranked,
    conversation_record,
    preference_record,
    same_text,
    says_nothing,
)
from llama_jax.synthesis.rejection import (
    CONVERSATIONS,
    PREFERENCES,
    SAMPLES,
    SCORES,
    SUMMARY,
    write_json,
)
from llama_jax.synthesis.scoring import Scorer
from llama_jax.synthesis.selecting import (
    Judged,
    Keeping,
    best_sample,
    pair_strength,
    provenance_of,
    read_judged,
)
from llama_jax.synthesis.verdicts import Verifier, check_verifiers

FOLDER = "critic"


@dataclasses.dataclass(frozen=True)
class Corrections:
    """How many prompts were poor, how many of them corrected, and why the others weren't."""

    poor: int
    corrected: int
    refused: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """As `summary.json` has it."""
        return {"poor": self.poor, "corrected": self.corrected, "refused": dict(self.refused)}


@dataclasses.dataclass(frozen=True)
class Correction:
    """A better answer to the prompt of `judged`, and how it came about."""

    judged: Judged
    message: Mapping[str, Any]
    author: str
    provenance: Mapping[str, Any]


def is_poor(judged: Judged, threshold: float | None = None) -> bool:
    """Whether no answer is right, or none scores as high as `threshold`."""
    if judged.verified and not any(judged.right(k) for k in range(len(judged.responses))):
        return True
    return threshold is not None and judged.scores is not None and max(judged.scores) < threshold


def read_rejected(
    folder: Path,
    prompts: Sequence[Prompt],
    open_scorer: Callable[[], Scorer] | None,
    verifiers: Sequence[Verifier],
    threshold: float | None,
) -> tuple[dict[str, Any], list[Judged]]:
    """Header and samples of a folder that rejection sampling filled, checked against the wishes."""
    if open_scorer is None and not verifiers:
        raise ConfigError("corrections need a reward model or a verifier to be held against")
    if threshold is not None and open_scorer is None:
        raise ConfigError("nothing is scored", key="threshold")
    check_verifiers(verifiers, prompts)
    return read_judged(folder / SAMPLES, folder / SCORES, prompts)


def to_correct(judged: Judged) -> int | None:
    """The number of the best answer that says anything: what is corrected."""
    able = [k for k, r in enumerate(judged.responses) if not says_nothing(r["message"])]
    ordered = judged.by_score([k for k in able if judged.right(k)]) + judged.by_score(
        [k for k in able if not judged.right(k)]
    )
    return ordered[0] if ordered else None


def better_one(answer: Judged, corrected: Judged, threshold: float | None) -> int | None:
    """The number of the correction that is kept, if one is."""
    k = best_sample(answer, Keeping(min_score=threshold))
    if k is None:
        return None
    message, old = answer.responses[k]["message"], to_correct(corrected)
    if any(same_text(message, response["message"]) for response in corrected.responses):
        return None
    if old is None or answer.scores is None or corrected.scores is None:
        return k
    was_wrong = answer.verified and not corrected.right(old)
    return k if was_wrong or answer.scores[k] > corrected.scores[old] else None


def write_corrections(
    folder: Path,
    header: Mapping[str, Any],
    found: Sequence[Correction],
    poor: int,
    refused: Mapping[str, int],
) -> Corrections:
    """Write the three files of `folder`."""
    conversations = (
        conversation_record(each.judged.record, each.message, each.provenance) for each in found
    )
    write_lines(folder / CONVERSATIONS, conversations)
    preferences = (_preference(header, each) for each in found)
    write_lines(folder / PREFERENCES, (each for each in preferences if each is not None))
    kept = {reason: count for reason, count in refused.items() if count}
    corrections = Corrections(poor, len(found), kept)
    write_json(folder / SUMMARY, corrections.to_json())
    return corrections


def _preference(header: Mapping[str, Any], correction: Correction) -> dict[str, Any] | None:
    """Edited over the best over the worst sample; of one alone edited over that; None of none."""
    judged, model = correction.judged, header["model"]["path"]
    edited = Ranked(correction.message, correction.author)
    chosen = to_correct(judged)
    if chosen is None:
        return None
    about = {"edit": dict(correction.provenance)}
    best = Ranked(judged.responses[chosen]["message"], model)
    rejected = _worst(judged, chosen)
    if rejected is None:
        about |= provenance_of(header, judged, rejected=chosen)
        return preference_record(judged.record, edited, best, "better", about)
    about |= provenance_of(header, judged, chosen=chosen, rejected=rejected)
    worst = Ranked(judged.responses[rejected]["message"], model)
    strength = pair_strength(judged, chosen, rejected)
    return preference_record(judged.record, best, worst, strength, about, edited=edited)


def _worst(judged: Judged, chosen: int) -> int | None:
    """The last by score that says something else, where it is not as good as the chosen one."""
    scores = judged.scores
    others = [
        k
        for k in range(len(judged.responses))
        if not says_nothing(judged.responses[k]["message"])
        and not same_text(judged.responses[k]["message"], judged.responses[chosen]["message"])
        and (judged.right(chosen), _score(scores, chosen)) > (judged.right(k), _score(scores, k))
    ]
    return judged.by_score(others)[-1] if others else None


def _score(scores: Sequence[float] | None, k: int) -> float:
    return 0.0 if scores is None else scores[k]
