"""Samples scored and verified into a second journal, beside that of the samples."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from llama_jax.synthesis.journal import Journal, read_journal
from llama_jax.synthesis.prompts import Prompt, SynthesisError
from llama_jax.synthesis.sampling import Progress, check_prompts
from llama_jax.synthesis.verdicts import Verifier, check_verifiers, verify
from llama_jax.tokenizers.chat import Message, message_from_json, messages_from_json


class Scorer(Protocol):
    """A reward: the higher, the better the last message answers those before it."""

    @property
    def name(self) -> str:
        """What records say it is."""
        ...

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> Sequence[float]:
        """One finite number for each conversation."""
        ...


def score_samples(
    samples: Path,
    prompts: Sequence[Prompt],
    path: Path,
    *,
    scorer: Scorer | None = None,
    verifiers: Sequence[Verifier] = (),
    workers: int = 2,
    progress: Progress | None = None,
) -> None:
    """Fill the journal at `path`: scores and verdicts of every sample; goes on where it ended.

    Args:
      samples: the samples' journal, whole.
      prompts: those that were sampled.
      path: of the journal to write.
      scorer: gives each sample its score.
      verifiers: give each sample their verdicts.
      workers: verdicts made at once; each may run a program.
      progress: told after each prompt.

    Raises:
      SynthesisError: samples that aren't whole or are of other prompts, a prompt that a verifier
        can't judge, a score that isn't finite, a journal begun otherwise, or with other references.
    """
    header, records = read_samples(samples, prompts)
    check_verifiers(verifiers, prompts)
    about = {
        "kind": "scores",
        "samples": header,
        "scorer": None if scorer is None else scorer.name,
        "verifiers": {verifier.name: repr(verifier) for verifier in verifiers},
    }
    if verifiers:
        # The samples don't depend on them, but verdicts do.
        about["references"] = _references_fingerprint(prompts)
    with Journal(path, about) as journal, ThreadPoolExecutor(workers) as pool:
        for done, (prompt, record) in enumerate(zip(prompts, records, strict=True), 1):
            if prompt.number not in journal:
                texts = [response["text"] for response in record["responses"]]
                verdicts = list(pool.map(lambda t, p=prompt: verify(verifiers, p, t), texts))
                journal.append(
                    {
                        "prompt": prompt.number,
                        "scores": None if scorer is None else _scores(scorer, record),
                        "verdicts": [
                            {name: verdict.to_json() for name, verdict in each.items()}
                            for each in verdicts
                        ],
                    }
                )
            if progress is not None:
                progress(done, len(prompts))


def read_samples(
    path: Path, prompts: Sequence[Prompt]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records of a journal of samples that has every one of the prompts.

    Raises:
      SynthesisError: it is of another kind or of other prompts, or some are missing.
    """
    return _read_whole(path, prompts, "samples", lambda header: header)


def read_scores(
    path: Path, prompts: Sequence[Prompt]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same of a journal of scores."""
    return _read_whole(path, prompts, "scores", lambda header: header.get("samples") or {})


def conversation_of(record: Mapping[str, Any], response: Mapping[str, Any]) -> list[Message]:
    """What was asked, and one response to it."""
    return [*messages_from_json(record["messages"]), message_from_json(response["message"])]


def _references_fingerprint(prompts: Sequence[Prompt]) -> str:
    text = json.dumps([dict(prompt.reference) for prompt in prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _scores(scorer: Scorer, record: Mapping[str, Any]) -> list[float]:
    conversations = [conversation_of(record, response) for response in record["responses"]]
    scores = [float(score) for score in scorer(conversations)]
    if len(scores) != len(conversations):
        raise SynthesisError(
            f"scorer {scorer.name} gave {len(scores)} scores for {len(conversations)} conversations"
        )
    wrong = next((i for i, score in enumerate(scores) if not math.isfinite(score)), None)
    if wrong is not None:
        raise SynthesisError(
            f"scorer {scorer.name} gave {scores[wrong]} for sample {wrong + 1} of prompt "
            f"{record['prompt'] + 1}"
        )
    return scores


def _read_whole(
    path: Path, prompts: Sequence[Prompt], kind: str, about_samples: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    header, records = read_journal(path)
    if header.get("kind") != kind:
        raise SynthesisError(f"{path}: holds {header.get('kind', 'something else')}, not {kind}")
    check_prompts(about_samples(header), prompts, path)
    if len(records) != len(prompts):
        raise SynthesisError(
            f"{path}: has {len(records)} of {len(prompts)} prompts; its making has not ended"
        )
    return header, records
