"""A whole file of `llama-jax sample`: one model in memory at a time."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from llama_jax.data.files import local_path
from llama_jax.synthesis.correcting import Corrections
from llama_jax.synthesis.critic import correct_by_model
from llama_jax.synthesis.edits import correct_by_edits
from llama_jax.synthesis.opening import open_model, scorer_opener
from llama_jax.synthesis.prompts import Prompt, read_prompts
from llama_jax.synthesis.rejection import SAMPLES, Drawing, score_and_select
from llama_jax.synthesis.sampling import Progress, sample_prompts
from llama_jax.synthesis.scoring import Scorer
from llama_jax.synthesis.selecting import Selection
from llama_jax.synthesis.settings import CriticTable, ModelTable, SamplingConfig
from llama_jax.synthesis.verdicts import Verifier, check_verifiers

# Given a stage's name, what is told its progress.
Told = Callable[[str], Progress]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What a run of it made; `corrections` where the file has a critic."""

    selection: Selection
    corrections: Corrections | None


def run_sampling(config: SamplingConfig, folder: Path, told: Told | None = None) -> Sampled:
    """Sample, score, keep and correct into `folder`; goes on where an earlier call ended.

    Raises:
      ConfigError, SynthesisError, InterchangeError, TokenizerError, ChatError: one line each.
    """
    prompts = read_prompts(local_path(config.prompts), system=config.system)
    check_verifiers(config.verifiers, prompts)
    draw(config.model, config.draw.drawing(config.k), prompts, folder, told)
    open_scorer = scorer_opener(config.reward, batch_size=config.draw.batch_size)
    selection = score_and_select(
        prompts,
        folder,
        open_scorer=open_scorer,
        verifiers=config.verifiers,
        keeping=config.keep.keeping(),
        progress=told,
    )
    corrections = None
    if config.critic is not None:
        corrections = correct(
            config.critic, config.model, prompts, folder,
            open_scorer=open_scorer, verifiers=config.verifiers, told=told,
        )  # fmt: skip
    return Sampled(selection, corrections)


def draw(
    model: ModelTable,
    drawing: Drawing,
    prompts: Sequence[Prompt],
    folder: Path,
    told: Told | None = None,
) -> None:
    """The samples alone; the model is let go of afterwards."""
    sample_prompts(
        open_model(model, batch_size=drawing.batch_size),
        prompts,
        folder / SAMPLES,
        k=drawing.k,
        wishes=drawing.wishes,
        max_new_tokens=drawing.max_new_tokens,
        batch_size=drawing.batch_size,
        progress=told("sampling") if told else None,
    )


def correct(
    critic: CriticTable,
    sampled: ModelTable,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    open_scorer: Callable[[], Scorer] | None = None,
    verifiers: Sequence[Verifier] = (),
    told: Told | None = None,
) -> Corrections:
    """What the critic makes of poor answers; `sampled` is the critic where none is named."""
    if critic.edits is not None:
        return correct_by_edits(
            Path(critic.edits),
            prompts,
            folder,
            threshold=critic.threshold,
            open_scorer=open_scorer,
            verifiers=verifiers,
        )
    return correct_by_model(
        open_model(critic.model or sampled, batch_size=critic.draw.batch_size),
        prompts,
        folder,
        critic.criticism(),
        open_scorer=open_scorer,
        verifiers=verifiers,
        progress=told,
    )
