"""Write the small data sets of the debug runs and rounds: sums, and answers to choose between.

python benchmarks/make_arithmetic.py       writes configs/data/arithmetic_*.jsonl, the same always
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "configs" / "data"
RECORDS = 400
PROMPTS, HELD_OUT_PROMPTS = 48, 32
# How far off an answer is, to how much worse it is.
STRENGTHS = ((10, "significantly"), (5, "better"), (2, "slightly"), (0, "marginally"))


def main() -> None:
    """All files."""
    draw = random.Random(0)
    _write("arithmetic_chats.jsonl", (_chat(draw) for _ in range(RECORDS)))
    _write("arithmetic_preferences.jsonl", (_preference(draw) for _ in range(RECORDS)))
    prompts = _prompts(draw, PROMPTS + HELD_OUT_PROMPTS)
    _write("arithmetic_prompts.jsonl", prompts[:PROMPTS])
    _write("arithmetic_held_out_prompts.jsonl", prompts[PROMPTS:])


def _problem(draw: random.Random) -> tuple[str, int]:
    a, b = draw.randint(0, 20), draw.randint(0, 20)
    if draw.random() < 0.5:
        return f"What is {a} + {b}?", a + b
    return f"What is {max(a, b)} - {min(a, b)}?", abs(a - b)


def _chat(draw: random.Random) -> dict[str, Any]:
    messages = []
    for _ in range(draw.choice((1, 1, 2))):
        question, answer = _problem(draw)
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"It is {answer}."},
        ]
    return {"messages": messages}


def _preference(draw: random.Random) -> dict[str, Any]:
    question, answer = _problem(draw)
    off = draw.choice((-15, -7, -3, -1, 1, 3, 7, 15))
    strength = next(name for least, name in STRENGTHS if abs(off) > least)
    record = {
        "prompt": question,
        "chosen": f"It is {answer}.",
        "rejected": f"It is {answer + off}.",
        "strength": strength,
    }
    if draw.random() < 0.1:
        record |= {"chosen": f"{answer}", "edited": f"It is {answer}."}
    return record


def _prompts(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Problems with their answers, no two the same; many of them are in the conversations too."""
    answers: dict[str, int] = {}
    while len(answers) < count:
        answers.update([_problem(draw)])
    return [{"prompt": question, "answer": answer} for question, answer in answers.items()]


def _write(name: str, records: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(record) + "\n" for record in records]
    (FOLDER / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
