"""What a run's directory says of it: its config, its starts, whether it is finished."""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
from etils import epath

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError, fingerprint, to_table, to_toml
from llama_jax.config.run import RunConfig
from llama_jax.config.run_files import CONFIG_FILE, RESULT_FILE, RUN_FILE, write_json, write_text
from llama_jax.training.compatibility import CHECKPOINT_KEYS, changes, check_compatible
from llama_jax.training.environment import describe_start
from llama_jax.training.inputs import Say


def check_against_earlier(
    config: RunConfig, run_dir: epath.Path, steps: list[int], say: Say
) -> bool:
    """Refuse a config that can't go on from the checkpoints of `steps` in `run_dir`.

    Returns:
      Whether it names another place for a checkpoint that the run began with.

    Raises:
      ConfigError: a value that the checkpoints contradict, or no config beside them.
    """
    path = run_dir / CONFIG_FILE
    if not steps:
        return False
    if not path.exists():
        raise ConfigError("absent, though there are checkpoints beside it", source=str(path))
    before = load_run_config(str(path))
    for notice in check_compatible(before, config, str(path)):
        say(notice)
    if steps[-1] > config.training.steps:
        raise ConfigError(
            f"{config.training.steps} is below the {steps[-1]} steps already done",
            key="training.steps",
            source=str(path),
        )
    return any(key in CHECKPOINT_KEYS for key, _, _ in changes(before, config))


def note_start(config: RunConfig, run_dir: epath.Path) -> None:
    """Write the resolved config, and add this start to `run.json`."""
    if jax.process_index() > 0:
        return
    path = run_dir / RUN_FILE
    earlier = json.loads(path.read_text())["starts"] if path.exists() else []
    start = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **describe_start()}
    write_json(path, {"fingerprint": fingerprint(config), "starts": [*earlier, start]})
    write_text(run_dir / CONFIG_FILE, to_toml(to_table(config)))


def finished_figures(
    config: RunConfig, run_dir: epath.Path, steps: list[int]
) -> dict[str, Any] | None:
    """The figures of the run if it has reached its last step and all was written."""
    path = run_dir / RESULT_FILE
    if not steps or steps[-1] != config.training.steps or not path.exists():
        return None
    figures = json.loads(path.read_text())
    return figures if figures["step"] == config.training.steps else None


def absolute(run_dir: epath.PathLike) -> epath.Path:
    """The folder by its full path, as Orbax asks; an object store's address stays as it is."""
    name = os.fspath(run_dir)
    return epath.Path(name if "://" in name else Path(name).resolve())
