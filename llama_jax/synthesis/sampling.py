"""K samples of each prompt into a journal, one line a prompt.

Sample k of a prompt depends on the seed, the prompt and k alone: not on the other prompts, their
order, the batch, or how often the run was killed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config.loading import ConfigError
from llama_jax.inference.generating import Answer, Task, make_task
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.sampling_choice import Wishes
from llama_jax.inference.sessions import Session
from llama_jax.synthesis.journal import Journal
from llama_jax.synthesis.prompts import Prompt, SynthesisError
from llama_jax.synthesis.provenance import describe_model
from llama_jax.tokenizers.chat import Message, message_to_json

# The Llama 3 paper takes 10 to 30 (section 4.2.2).
DEFAULT_K = 10
# Told the prompts done and those in all.
Progress = Callable[[int, int], None]


def sample_prompts(
    session: Session,
    prompts: Sequence[Prompt],
    path: Path,
    *,
    k: int = DEFAULT_K,
    wishes: Wishes = Wishes(),  # noqa: B008
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> None:
    """Fill the journal at `path` with `k` samples of each prompt; goes on where it ended.

    Args:
      session: the model; with a chat format, texts are users' messages.
      prompts: all of them, also those that are done already.
      path: of the journal.
      k: samples of each prompt.
      wishes: how to draw; the same prompt under the same seed gives the same samples.
      max_new_tokens: of each sample, as `inference.make_task`.
      batch_size: samples made at once; changes none of them.
      progress: told after each prompt.

    Raises:
      ConfigError, ChatError: a prompt or setting that the model can't have, before anything is run.
      SynthesisError: a journal begun otherwise.
    """
    if k < 1:
        raise ConfigError(f"{k} samples of a prompt; at least 1", key="k")
    requests = [prompt.request for prompt in prompts]
    task = make_task(
        session,
        requests,
        wishes,
        chat=session.chat_format is not None,
        max_new_tokens=max_new_tokens,
    )
    if k > 1 and task.sampling.temperature == 0:
        raise ConfigError(f"{k} samples would all be the same at 0", key="temperature")
    header = {
        "kind": "samples",
        "model": describe_model(session.source),
        "sampling": sampling_to_json(task.sampling),
        "k": k,
        "prompts": prompts_fingerprint(prompts),
    }
    with Journal(path, header) as journal:
        _fill(journal, task, prompts, k, batch_size, progress)


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Sixteen hex digits of what is asked, in order."""
    text = json.dumps([prompt.fingerprint for prompt in prompts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sampling_to_json(sampling: Sampling) -> dict[str, Any]:
    """The settings as records hold them."""
    table = dataclasses.asdict(sampling)
    return table | {"stop_ids": sorted(sampling.stop_ids)}


def check_prompts(header: dict[str, Any], prompts: Sequence[Prompt], path: Path) -> None:
    """Raise `SynthesisError` where a journal was made of other prompts."""
    if header.get("prompts") != prompts_fingerprint(prompts):
        raise SynthesisError(f"{path}: was made of other prompts than these {len(prompts)}")


def _fill(
    journal: Journal,
    task: Task,
    prompts: Sequence[Prompt],
    k: int,
    batch_size: int,
    progress: Progress | None,
) -> None:
    left = [i for i, prompt in enumerate(prompts) if prompt.number not in journal]
    rest = dataclasses.replace(
        task,
        requests=[task.requests[i] for i in left],
        prompts=[task.prompts[i] for i in left],
    )
    answers = rest.answers(n=k, batch_size=batch_size)
    for done, i in enumerate(left, len(prompts) - len(left) + 1):
        responses = [_response(next(answers)) for _ in range(k)]
        prompt = prompts[i]
        journal.append(
            {
                "prompt": prompt.number,
                "messages": [message_to_json(m) for m in prompt.kept_messages],
                "tools": [dict(tool) for tool in (prompt.original or prompt.request).tools],
                "reference": dict(prompt.reference),
                "responses": responses,
            }
        )
        if progress is not None:
            progress(done, len(prompts))


def _response(answer: Answer) -> dict[str, Any]:
    done = answer.completion
    told = answer.to_json()
    message = told.get("message") or message_to_json(Message("assistant", done.text))
    return {
        "text": done.text,
        "message": message,
        "finish_reason": done.finish_reason,
        "stop": answer.session.token_name(done.stop),
        "tokens": len(done.ids),
    }
