"""Optimiser steps of SFT and DPO beside TRL's and transformers' trainers: same weights, same batch.

    python benchmarks/post_training_beside_trl.py
    python benchmarks/post_training_beside_trl.py --model smollm2-135m --repeats 3

Each side is a process that lives through the run, and steps are taken in turns: ours, theirs, ours,
so that whatever else the machine does falls on all. A step is loss, gradients, clipping at 1 and
AdamW, in float32 on all cores, nothing of theirs recomputed; losses of the first step must agree.
Medians; the first two steps, which compile and make the optimizer's state, are left out. DPO has
Llama 3's NLL term, its reference computed beforehand or (`--reference live`) in each step. Where
TRL or transformers isn't installed that side is left out, with a line that says so.
"""

import argparse
import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from post_training_ours import Case, Turns, run_llama_jax
from post_training_trainers import run_trainer, write_weights
from train_step import environment_apart, machine

STAGES = ("sft", "dpo")
# Sides by stage, each with what it needs; transformers alone has no DPO.
TRAINER = ("torch", "transformers", "accelerate", "datasets")
NEEDS = {"llama_jax": (), "trl": (*TRAINER, "trl"), "transformers": TRAINER}
WARM_UP_STEPS = 2
# Between float32 losses of the first step, relative.
TOLERANCE = 1e-4


class Side:
    """An engine's process, told when to step."""

    def __init__(self, case: Case, folder: str) -> None:
        self.case, self.steps = case, []
        self._errors = Path(folder) / f"{case.stage}-{case.engine}.txt"
        command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
        begun = time.perf_counter()
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                env=environment_apart("cpu") | {"HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._answer()
        self.ready_s = time.perf_counter() - begun

    def step(self) -> None:
        """One, waited for."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        self.steps.append(self._answer())

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            reason = (self._errors.read_text().strip().splitlines() or ["no message"])[-1]
            raise SystemExit(f"{self.case.stage}, {self.case.engine}: {reason}")
        return json.loads(line)

    def figures(self) -> dict[str, Any]:
        """Of the steps that count."""
        times, counted = self.times, self.steps[WARM_UP_STEPS:]
        median_s = statistics.median(times)
        return {
            **dataclasses.asdict(self.case),
            "tokens_per_s": self.case.sequences * self.case.seq_len / median_s,
            "step_s": median_s,
            # What other work on the machine slowed least.
            "fastest_s": min(times),
            "slowest_s": max(times),
            # Over all cores: what a step costs even when other processes share the machine.
            "processor_s": statistics.median(step["processor_s"] for step in counted),
            "ready_s": self.ready_s,
            "compile_s": self.steps[0]["step_s"] - median_s,
            "peak_memory_gib": self.steps[-1]["peak_memory_gib"],
            "first_loss": self.steps[0]["loss"],
            "last_loss": self.steps[-1]["loss"],
        }

    @property
    def times(self) -> list[float]:
        """Seconds of each step that counts."""
        return [step["step_s"] for step in self.steps[WARM_UP_STEPS:]]


def compare(cases: Sequence[Case], folder: str) -> dict[str, Any]:
    """A stage by each engine, step by step in turns; `ratios` are of speed, ours to theirs.

    Raises:
      SystemExit: losses of the first step that differ, or a side that failed.
    """
    sides: list[Side] = []
    try:
        for case in cases:
            sides.append(Side(case, folder))
        for number in range(cases[0].steps):
            for side in sides[:: 1 if number % 2 else -1]:
                side.step()
    finally:
        for side in sides:
            side.end()
    ours, *others = sides
    for side in others:
        check_losses(ours, side)
    return {
        "sides": [side.figures() for side in sides],
        "ratios": {side.case.engine: ratios(ours, side) for side in others},
    }


def check_losses(ours: Side, other: Side) -> None:
    """Whether the two compute the same thing."""
    first, theirs = ours.steps[0]["loss"], other.steps[0]["loss"]
    if abs(first - theirs) > TOLERANCE * abs(theirs):
        raise SystemExit(
            f"{other.case.stage}: the first step's loss is {first:.6f} here and {theirs:.6f} by "
            f"{other.case.engine}; the two don't do the same work"
        )


def ratios(ours: Side, other: Side) -> dict[str, float]:
    """Of the medians, of the fastest steps, and the least and most of neighbouring steps."""
    pairs = [theirs / mine for mine, theirs in zip(ours.times, other.times, strict=True)]
    return {
        "median": statistics.median(other.times) / statistics.median(ours.times),
        "fastest": min(other.times) / min(ours.times),
        "least": min(pairs),
        "most": max(pairs),
    }


def print_comparison(found: dict[str, Any]) -> None:
    """A line a side, and one a ratio."""
    for side in found["sides"]:
        print(
            f"{side['stage']}  {side['engine']:<13} {side['tokens_per_s']:>8.1f} tokens/s "
            f"{side['step_s']:>7.3f} s a step ({side['fastest_s']:.3f} to "
            f"{side['slowest_s']:.3f})  "
            f"processor {side['processor_s']:>6.3f} s  "
            f"compile {side['compile_s']:>5.1f} s  ready after {side['ready_s']:>4.1f} s  "
            f"peak {side['peak_memory_gib']:>5.2f} GiB  "
            f"loss {side['first_loss']:.6f}, at the end {side['last_loss']:.6f}"
        )
    for engine, ratio in found["ratios"].items():
        print(
            f"{found['sides'][0]['stage']}  llama_jax / {engine}: {ratio['median']:.2f} of its "
            f"speed ({ratio['fastest']:.2f} by the fastest steps; {ratio['least']:.2f} to "
            f"{ratio['most']:.2f} step by step)"
        )
    sys.stdout.flush()


def installed_engines(asked: Sequence[str]) -> list[str]:
    """Those that can run; of others a line on what to install."""
    found = []
    for engine in asked:
        missing = [name for name in NEEDS[engine] if importlib.util.find_spec(name) is None]
        if missing:
            print(f"{engine} is left out; pip install {' '.join(missing)}", file=sys.stderr)
        else:
            found.append(engine)
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="10m", help="a shipped model's name, NAME:LAYERS, a path"
    )
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--engines", nargs="+", default=("trl", "transformers"), choices=NEEDS)
    parser.add_argument("--sequences", type=int, default=4, help="half of them chosen in DPO")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; the median is shown")
    parser.add_argument("--reference", choices=("cached", "live"), default="cached")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sequences % 2:
        parser.error("--sequences: DPO takes them in pairs")
    return arguments


def main() -> None:
    """A block of lines a stage; or, as a child process, one side's steps."""
    args = parse_arguments()
    if args.case:
        case = Case(**json.loads(args.case))
        (run_llama_jax if case.engine == "llama_jax" else run_trainer)(case, Turns())
        return
    engines = installed_engines(["llama_jax", *(e for e in args.engines if e != "llama_jax")])
    results = []
    with tempfile.TemporaryDirectory() as folder:
        weights = ""
        if len(engines) > 1:
            weights = str(Path(folder) / "weights")
            write_weights(args.model, weights)
        for stage in args.stages:
            shape = (args.model, args.sequences, args.seq_len, args.repeats + WARM_UP_STEPS)
            cases = [
                Case(engine, stage, *shape, args.reference, weights)
                for engine in engines
                if stage == "sft" or engine != "transformers"
            ]
            results.append(compare(cases, folder))
            if not args.json:
                print_comparison(results[-1])
    if args.json:
        packages = {name: version(name) for name in engines[1:]}
        print(json.dumps({"machine": {**machine(), **packages}, "results": results}, indent=2))


if __name__ == "__main__":
    main()
