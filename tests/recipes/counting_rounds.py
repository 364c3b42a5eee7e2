"""Rounds of small stages that write what they read; run as a script, to be killed.

Each stage writes its output a line at a time, and goes on with the lines that are there. No tests.
"""

import sys
import time
from pathlib import Path

from llama_jax.recipes.rounds import run_rounds
from llama_jax.recipes.stages import Result, Stage

LINES = 5


def stages(number, *, pause_s=0.0, calls=None):
    def write(name, own, *parts):
        def run(context):
            if calls is not None:
                calls.append(f"{number}.{name}")
            path = context.folder / f"{own}.txt"
            told = " ".join(f"{p}={_last(context.inputs[p])}" for p in parts if p in context.inputs)
            have = _whole(path)
            for i in range(have, LINES):
                with path.open("a") as file:
                    file.write(f"{number}.{name}.{i}[{told}]\n")
                time.sleep(pause_s)
            return Result({own: path}, {"lines": LINES})

        return run

    return [
        Stage("sft", ("model",), ("model",), write("sft", "model", "model", "chosen"),
              uses=("chosen",)),
        Stage("sample", ("model", "prompts"), ("samples",), write("sample", "samples", "model")),
        Stage("score", ("samples",), ("chosen",), write("score", "chosen", "samples"),
              settings={"k": 4}),
    ]  # fmt: skip


def _last(path):
    return len(path.read_text().splitlines()), path.parent.name


def _whole(path):
    """Whole lines; what a kill left of one is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    path.write_bytes(whole)
    return whole.count(b"\n")


def start(folder):
    (folder / "start.txt").write_text("weights\n")
    (folder / "prompts.txt").write_text("questions\n")
    return {"model": folder / "start.txt", "prompts": folder / "prompts.txt"}


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.mkdir(exist_ok=True)
    slow = float(sys.argv[2])
    run_rounds(where / "rounds", 2, lambda n: stages(n, pause_s=slow), start(where))
