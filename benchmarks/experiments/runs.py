"""Runs of the experiments, each by the command that a user would type, in a process of its own."""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.config.loading import to_table, to_toml
from llama_jax.interchange.opening import open_source

Records = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the experiments share.

    Attributes:
      checkpoint: that all of it starts from.
      work: a folder for runs and data; what is there already isn't made again.
      seeds: of training.
      batch_size: rows a step.
    """

    checkpoint: str
    work: Path
    seeds: tuple[int, ...]
    batch_size: int

    def train(self, name: str, **tables: Any) -> Path:
        """The folder of a run from the checkpoint; `tables` replace those of `_run_table`."""
        folder, file = self.work / name, self.work / f"{name}.toml"
        table = self._run_table() | tables
        _write(file, to_toml(table))
        if not (folder / "result.json").exists():
            _command("train", str(file), "--run-dir", str(folder))
        return folder

    def sample(self, name: str, model: str, prompts: Path, k: int, draw: Mapping[str, Any]) -> Path:
        """The folder of `k` verified answers to each prompt."""
        table = {
            "prompts": str(prompts),
            "k": k,
            "model": {"path": model, "dtype": "float32"},
            "draw": dict(draw),
            "verifiers": [{"kind": "answer"}],
        }
        folder, file = self.work / name, self.work / f"{name}.toml"
        _write(file, to_toml(table))
        if not (folder / "summary.json").exists():
            _command("sample", str(file), "--out", str(folder))
        return folder

    def records(self, name: str, records: Iterable[Mapping[str, Any]]) -> Path:
        """A file of JSON lines."""
        path = self.work / f"{name}.jsonl"
        _write(path, "".join(json.dumps(record) + "\n" for record in records))
        return path

    def model_table(self, **changes: Any) -> dict[str, Any]:
        """The checkpoint's own architecture."""
        return to_table(dataclasses.replace(open_source(self.checkpoint).config, **changes))

    def _run_table(self) -> dict[str, Any]:
        return {
            "model": self.model_table(),
            "tokenizer": tokenizer_table(Path(self.checkpoint)),
            "init": {"path": self.checkpoint},
            # Two cores take all the memory they need, and emulate bfloat16 slowly.
            "execution": {"compute_dtype": "float32", "remat": "none"},
            "optimizer": {"kind": "adamw", "weight_decay": 0.0},
            "checkpoint": {"keep_last": 1, "keep_best": False},
        }


def tokenizer_table(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's vocabulary: a run's lies in a folder of its own."""
    within = checkpoint / "tokenizer"
    return {"kind": "file", "path": str(within if within.is_dir() else checkpoint)}


def rows_table(setup: Setup, arguments: argparse.Namespace, **source: Any) -> dict[str, Any]:
    """The `data` table of packed rows of one source: `conversations` or `preferences`."""
    return {
        "seq_len": arguments.seq_len,
        "batch_size": setup.batch_size,
        "packing": "best_fit",
        "sources": [{"name": "experiment", **source}],
    }


def schedule(peak: float, steps: int) -> dict[str, Any]:
    """A tenth of warm-up, then cosine."""
    return {"kind": "cosine", "peak": peak, "warmup_steps": max(1, steps // 10)}


def read_records(path: Path, most: int | None = None) -> Records:
    """The first records of a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, most)]


def read_verdicts(folder: Path) -> list[list[bool]]:
    """Of each prompt that was sampled, whether each of its answers is right."""
    found = read_records(folder / "scores.jsonl")[1:]
    return [[v["answer"]["passed"] for v in each["verdicts"]] for each in found]


def read_losses(run: Path) -> tuple[list[int], list[float]]:
    """Steps and training losses of a run."""
    found = [r for r in read_records(run / "metrics.jsonl") if "loss" in r]
    return [r["step"] for r in found], [r["loss"] for r in found]


def _command(*words: str) -> None:
    print("llama-jax", *words, flush=True)
    subprocess.run([sys.executable, "-m", "llama_jax", *words], check=True)


def _write(path: Path, text: str) -> None:
    """Refuses to change a file: what was made from the one that is there isn't made again."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{path} is of other settings; give another --work")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
