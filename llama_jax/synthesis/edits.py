"""Corrections that people wrote, from a file of JSON lines.

{"prompt": 0, "edited": "...", "author": "..."} a line; `prompt` is the number in the journals.
"""

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.synthesis.correcting import (
    FOLDER,
    Correction,
    Corrections,
    better_one,
    is_poor,
    read_rejected,
    write_corrections,
)
from llama_jax.synthesis.prompts import Prompt, SynthesisError
from llama_jax.synthesis.records import same_text
from llama_jax.synthesis.scoring import Scorer
from llama_jax.synthesis.selecting import Judged
from llama_jax.synthesis.verdicts import Verifier, verify
from llama_jax.tokenizers.chat import Message


def correct_by_edits(
    edits: Path,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    threshold: float | None = None,
    open_scorer: Callable[[], Scorer] | None = None,
    verifiers: Sequence[Verifier] = (),
) -> Corrections:
    """Take up the edits of a file, of poor prompts and of others.

    An edit is kept where it passes the verifiers, and where there are scores is at least at the
    threshold and above what it corrects; others are counted. Here or by `correct_by_model`: the
    later call replaces the earlier one's files.

    Raises:
      SynthesisError: a line that is none, of no such prompt, of one that has an edit already, or
        that says what a sample says; naming the line.
    """
    header, judged = read_rejected(folder, prompts, open_scorer, verifiers, threshold)
    poor = sum(is_poor(each, threshold) for each in judged)
    scorer = None if open_scorer is None else open_scorer()
    found: list[Correction] = []
    refused: collections.Counter[str] = collections.Counter()
    for number, entry in _read_edits(edits, judged).items():
        message = {"role": "assistant", "content": entry["edited"]}
        answer = _judge(judged[number], prompts[number], message, scorer, verifiers)
        if better_one(answer, judged[number], threshold) is None:
            refused["the edit is not better"] += 1
            continue
        author = entry.get("author", "person")
        provenance = {"prompt": number, "author": author, "edits": edits.name}
        provenance |= {"scores": answer.scores, "verdicts": list(answer.verdicts)}
        found.append(Correction(judged[number], message, author, provenance))
    return write_corrections(folder / FOLDER, header, found, poor, refused)


def _judge(
    judged: Judged,
    prompt: Prompt,
    message: Mapping[str, Any],
    scorer: Scorer | None,
    verifiers: Sequence[Verifier],
) -> Judged:
    """An edit as if it were the only sample."""
    text = message["content"]
    response = {"text": text, "message": message, "finish_reason": "stop", "tokens": 0}
    verdicts = {name: v.to_json() for name, v in verify(verifiers, prompt, text).items()}
    scores = None
    if scorer is not None:
        scores = list(scorer([[*prompt.kept_messages, Message("assistant", text)]]))
    return Judged({**judged.record, "responses": [response]}, scores, [verdicts])


def _read_edits(path: Path, judged: Sequence[Judged]) -> dict[int, dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SynthesisError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    edits: dict[int, dict[str, Any]] = {}
    for place, line in enumerate(lines, 1):
        if line.strip():
            number, entry = _edit(line, f"{path}:{place}", judged)
            if number in edits:
                raise SynthesisError(f"{path}:{place}: prompt {number} has an edit already")
            edits[number] = entry
    return dict(sorted(edits.items()))


def _edit(line: str, where: str, judged: Sequence[Judged]) -> tuple[int, dict[str, Any]]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not {"prompt", "edited"} <= entry.keys():
        raise SynthesisError(f"{where}: not an object with 'prompt' and 'edited'")
    number, text = entry["prompt"], entry["edited"]
    if type(number) is not int or not 0 <= number < len(judged):
        raise SynthesisError(f"{where}: prompt {number!r} is not one of 0 to {len(judged) - 1}")
    if not isinstance(text, str) or not text.strip():
        raise SynthesisError(f"{where}: 'edited' is no text")
    if not isinstance(entry.get("author", ""), str):
        raise SynthesisError(f"{where}: 'author' is no text")
    message = {"role": "assistant", "content": text}
    if any(same_text(message, response["message"]) for response in judged[number].responses):
        raise SynthesisError(f"{where}: says what a sample of prompt {number} says")
    return number, entry
