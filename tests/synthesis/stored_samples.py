"""Journals of samples written by hand, and a reward model that looks scores up. No tests here."""

import json

from llama_jax.synthesis.journal import Journal
from llama_jax.synthesis.sampling import prompts_fingerprint

MODEL = {"path": "policy", "format": "hf", "fingerprint": "0" * 16}


class Stored:
    """A reward model that looks the score up by the answer's text."""

    name = "stored"

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, conversations):
        return [self.scores[conversation[-1].content] for conversation in conversations]


def write_samples(folder, prompts, answers):
    """A journal of samples as sampling leaves it; an answer ending in ~ was cut."""
    header = {"kind": "samples", "model": MODEL, "sampling": {"seed": 0}, "k": len(answers[0])}
    header["prompts"] = prompts_fingerprint(prompts)
    with Journal(folder / "samples.jsonl", header) as journal:
        for prompt, row in zip(prompts, answers, strict=True):
            journal.append(
                {
                    "prompt": prompt.number,
                    "messages": [{"role": "user", "content": prompt.request.prompt}],
                    "tools": [],
                    "reference": dict(prompt.reference),
                    "responses": [_response(text) for text in row],
                }
            )


def _response(text):
    return {
        "text": text,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "length" if text.endswith("~") else "stop",
        "stop": None,
        "tokens": len(text),
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
