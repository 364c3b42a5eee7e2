"""Rejection sampling in one folder: sample, score and verify, keep the best.

samples.jsonl        K samples a prompt       conversations.jsonl  the best answers, for SFT
scores.jsonl         scores and verdicts      preferences.jsonl    pairs, for reward models and DPO
summary.json         yields by K              yield.png            the same as curves
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.inference.sampling_choice import Wishes
from llama_jax.inference.sessions import Session
from llama_jax.synthesis.prompts import Prompt
from llama_jax.synthesis.sampling import DEFAULT_K, Progress, sample_prompts
from llama_jax.synthesis.scoring import Scorer, score_samples
from llama_jax.synthesis.selecting import Keeping, Selection, select
from llama_jax.synthesis.verdicts import Verifier, check_verifiers
from llama_jax.synthesis.yields import plot_yield

SAMPLES, SCORES = "samples.jsonl", "scores.jsonl"
CONVERSATIONS, PREFERENCES, SUMMARY = "conversations.jsonl", "preferences.jsonl", "summary.json"
YIELD = "yield.png"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How samples are drawn; see `sample_prompts`."""

    k: int = DEFAULT_K
    wishes: Wishes = Wishes()
    max_new_tokens: int | None = None
    batch_size: int = 8


def rejection_sample(
    session: Session,
    prompts: Sequence[Prompt],
    folder: Path,
    drawing: Drawing = Drawing(),
    *,
    open_scorer: Callable[[], Scorer] | None = None,
    verifiers: Sequence[Verifier] = (),
    keeping: Keeping = Keeping(),  # noqa: B008
    progress: Callable[[str], Progress] | None = None,
) -> Selection:
    """Fill `folder`, from where an earlier call of it ended; a finished one changes nothing.

    Args:
      session: the model that answers.
      prompts: what it answers.
      folder: made where it isn't there.
      drawing: how.
      open_scorer: called when the samples are there, so that a reward model takes memory no sooner.
      verifiers: of each sample.
      keeping: what of it all is kept.
      progress: given a stage's name, what is told its progress.

    Raises:
      ConfigError, ChatError, SynthesisError: see the three parts.
    """
    check_verifiers(verifiers, prompts)
    told = progress or _silent
    sample_prompts(
        session,
        prompts,
        folder / SAMPLES,
        k=drawing.k,
        wishes=drawing.wishes,
        max_new_tokens=drawing.max_new_tokens,
        batch_size=drawing.batch_size,
        progress=told("sampling"),
    )
    return score_and_select(
        prompts, folder, open_scorer=open_scorer, verifiers=verifiers, keeping=keeping,
        progress=progress,
    )  # fmt: skip


def score_and_select(
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    open_scorer: Callable[[], Scorer] | None = None,
    verifiers: Sequence[Verifier] = (),
    keeping: Keeping = Keeping(),  # noqa: B008
    progress: Callable[[str], Progress] | None = None,
) -> Selection:
    """The second half of `rejection_sample`, over samples that are there."""
    told = progress or _silent
    scores = None
    if open_scorer is not None or verifiers:
        scores = folder / SCORES
        score_samples(
            folder / SAMPLES,
            prompts,
            scores,
            scorer=None if open_scorer is None else open_scorer(),
            verifiers=verifiers,
            progress=told("scoring"),
        )
    selection = select(
        folder / SAMPLES,
        scores,
        prompts,
        conversations=folder / CONVERSATIONS,
        preferences=folder / PREFERENCES,
        keeping=keeping,
    )
    write_json(folder / SUMMARY, selection.figures)
    plot_yield(selection.figures, folder / YIELD, f"{len(prompts)} prompts")
    return selection


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """An object to a file, in one piece."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _silent(stage: str) -> Progress:
    return lambda done, total: None
