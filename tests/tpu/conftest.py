"""A pretended cloud, and the scripts of tpu/ run in it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TPU = Path(__file__).parents[2] / "tpu"
SETTINGS = {
    "SLICE_NAME": "small",
    "SLICE_PROJECT": "our-project",
    "SLICE_ZONE": "us-west4-a",
    "SLICE_ACCELERATOR_TYPE": "v5litepod-16",
    "SLICE_RUN_DIR": "gs://bucket/run",
    "SLICE_POLL_S": "0",
    "SLICE_PRICE_PER_CHIP_HOUR": "1.5",
}


@dataclasses.dataclass
class Cloud:
    """The folder of the fake gcloud, with what it is to play."""

    folder: Path

    def play(self, **world):
        """Set what the world is and what will happen in it."""
        path = self.folder / "world.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, "name": "small", **world}))

    @property
    def world(self):
        return json.loads((self.folder / "world.json").read_text())

    @property
    def calls(self):
        """Every call of gcloud so far, as one line each."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [" ".join(json.loads(line)) for line in lines]

    def count(self, part):
        """Calls that hold `part`."""
        return sum(part in call for call in self.calls)

    def machine(self, node, worker):
        """The home of a worker."""
        return self.folder / "machines" / node / str(worker)

    def run(self, script, *arguments, timeout_s=300, **settings):
        """Run a script; SETTINGS, with `settings` over them; None leaves one out."""
        values = {**SETTINGS, **settings}
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLICE_")},
            **{name: value for name, value in values.items() if value is not None},
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_CLOUD": str(self.folder),
        }
        return subprocess.run(
            ["bash", str(TPU / f"{script}.sh"), *arguments],
            env=environment, capture_output=True, text=True, timeout=timeout_s,
            cwd=self.folder,
        )  # fmt: skip


@pytest.fixture
def cloud(tmp_path):
    """An empty project; jobs that a test left running on its machines are ended."""
    programs = tmp_path / "bin"
    programs.mkdir()
    fake = Path(__file__).with_name("fake_gcloud.py")
    (programs / "gcloud").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {fake} "$@"\n')
    (programs / "gcloud").chmod(0o755)
    there = Cloud(tmp_path)
    there.play()
    yield there
    for pid in tmp_path.glob("machines/*/*/llama-jax-job/pid"):
        subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], capture_output=True)
