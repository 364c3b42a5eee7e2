"""A critic: a model that is shown a poor answer, and writes a better one (see `correcting`)."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config.loading import ConfigError
from llama_jax.inference.requests import Request
from llama_jax.inference.sampling_choice import Wishes
from llama_jax.inference.sessions import Session
from llama_jax.synthesis.correcting import (
    FOLDER,
    Correction,
    Corrections,
    better_one,
    is_poor,
    read_rejected,
    to_correct,
    write_corrections,
)
from llama_jax.synthesis.prompts import Prompt
from llama_jax.synthesis.rejection import SAMPLES, SCORES
from llama_jax.synthesis.sampling import Progress, sample_prompts
from llama_jax.synthesis.scoring import Scorer, score_samples
from llama_jax.synthesis.selecting import Judged, provenance_of, read_judged
from llama_jax.synthesis.verdicts import Verifier
from llama_jax.tokenizers.chat import Message

TEMPLATE = """\
Below are a question and an answer to it that is not good enough.

Question:
{question}

Answer:
{answer}
{findings}
Write a better answer to the question. Write the answer alone, as one who answers it first."""
_FIELDS = ("{question}", "{answer}")


@dataclasses.dataclass(frozen=True)
class Criticism:
    """When and how a model corrects.

    Attributes:
      threshold: a prompt is poor, too, where its best score is below this.
      tries: corrections of each poor prompt, of which the best is kept.
      wishes: how they are drawn.
      tell_reasons: show the critic why verifiers refused the answer; of an exact answer that
        tells what the right one is.
      template: with {question}, {answer} and, where reasons are told, {findings}.
    """

    threshold: float | None = None
    tries: int = 4
    wishes: Wishes = Wishes()
    tell_reasons: bool = False
    max_new_tokens: int | None = None
    batch_size: int = 8
    template: str = TEMPLATE

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ConfigError("at least 1", key="tries")
        for field in (*_FIELDS, *(("{findings}",) if self.tell_reasons else ())):
            if field not in self.template:
                raise ConfigError(f"has no {field}", key="template")


def correct_by_model(
    critic: Session,
    prompts: Sequence[Prompt],
    folder: Path,
    criticism: Criticism = Criticism(),
    *,
    open_scorer: Callable[[], Scorer] | None = None,
    verifiers: Sequence[Verifier] = (),
    progress: Callable[[str], Progress] | None = None,
) -> Corrections:
    """Correct the poor prompts of `folder`, which rejection sampling filled; goes on after a kill.

    A correction is kept where it passes the verifiers, and where there are scores is at least at
    the threshold and above what it corrects.

    Raises:
      ConfigError: neither a scorer nor a verifier, or a threshold without scores.
      SynthesisError: journals that aren't whole or were begun otherwise.
    """
    header, judged = read_rejected(folder, prompts, open_scorer, verifiers, criticism.threshold)
    pairs = zip(prompts, judged, strict=True)
    poor = [(p, each) for p, each in pairs if is_poor(each, criticism.threshold)]
    able = [(p, each) for p, each in poor if to_correct(each) is not None]
    refused = collections.Counter({"nothing to correct": len(poor) - len(able)})
    asked = [_critic_prompt(prompt, each, criticism) for prompt, each in able]
    found: list[Correction] = []
    if asked:
        about, answers = _ask(critic, asked, folder, criticism, open_scorer, verifiers, progress)
        for (_, each), answer in zip(able, answers, strict=True):
            k = better_one(answer, each, criticism.threshold)
            if k is None:
                refused["no correction is better"] += 1
            else:
                provenance = provenance_of(about, answer, kept=k)
                message, author = answer.responses[k]["message"], about["model"]["path"]
                found.append(Correction(each, message, author, provenance))
    return write_corrections(folder / FOLDER, header, found, len(poor), refused)


def _critic_prompt(prompt: Prompt, judged: Judged, criticism: Criticism) -> Prompt:
    k = to_correct(judged)
    assert k is not None
    findings = ""
    if criticism.tell_reasons:
        wrong = [v["reason"] for v in judged.verdicts[k].values() if not v["passed"]]
        findings = "".join(f"\nIt was found: {reason}" for reason in wrong) + "\n" * bool(wrong)
    # Replaced one by one: braces in a question are not fields.
    parts = {
        "{question}": _as_text(prompt.messages),
        "{answer}": judged.responses[k]["text"].strip(),
        "{findings}": findings,
    }
    text = _filled(criticism.template, parts)
    return Prompt(prompt.number, Request(prompt=text), prompt.reference, original=prompt.request)


def _filled(template: str, parts: Mapping[str, str]) -> str:
    name = min((n for n in parts if n in template), key=template.index, default=None)
    if name is None:
        return template
    before, _, after = template.partition(name)
    return before + parts[name] + _filled(after, parts)


def _as_text(messages: Sequence[Message]) -> str:
    if len(messages) == 1:
        return messages[0].content.strip()
    return "\n\n".join(f"{m.role}: {m.content.strip()}" for m in messages)


def _ask(
    critic: Session,
    asked: Sequence[Prompt],
    folder: Path,
    criticism: Criticism,
    open_scorer: Callable[[], Scorer] | None,
    verifiers: Sequence[Verifier],
    progress: Callable[[str], Progress] | None,
) -> tuple[dict[str, Any], list[Judged]]:
    """The critic's answers, judged as answers to the original prompts."""
    samples, scores = folder / FOLDER / SAMPLES, folder / FOLDER / SCORES
    sample_prompts(
        critic,
        asked,
        samples,
        k=criticism.tries,
        wishes=criticism.wishes,
        max_new_tokens=criticism.max_new_tokens,
        batch_size=criticism.batch_size,
        progress=progress("correcting") if progress else None,
    )
    score_samples(
        samples,
        asked,
        scores,
        scorer=None if open_scorer is None else open_scorer(),
        verifiers=verifiers,
        progress=progress("scoring corrections") if progress else None,
    )
    return read_judged(samples, scores, asked)
