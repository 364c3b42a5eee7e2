"""Runs whose models others begin with: `run:NAME` in a field that names a checkpoint."""

from collections.abc import Iterable
from pathlib import Path

from etils import epath
from rich.console import Console

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError
from llama_jax.config.run import DistillConfig, RunConfig
from llama_jax.config.run_files import CONFIG_FILE, default_run_dir, run_named
from llama_jax.interchange.run_checkpoint import steps
from llama_jax.training.notices import printer
from llama_jax.training.run import Outcome, train
from llama_jax.training.run_dir import finished_figures


def checkpoints_of(config: RunConfig) -> list[str]:
    """The checkpoints that a run reads: what it starts from, its adapter, its teacher."""
    found = [] if config.init is None else [config.init.path, config.init.adapter]
    if isinstance(config.objective, DistillConfig):
        found.append(config.objective.path)
    return [path for path in found if path is not None]


def train_needed(
    checkpoints: Iterable[str], console: Console, *, needed_by: tuple[str, ...] = ()
) -> Outcome | None:
    """Train the runs that are named as checkpoints and aren't finished, what they need first.

    One that has begun goes on by the config in its folder, whatever it was begun with.

    Args:
      checkpoints: paths, of which `run:NAME` are runs.
      console: where progress is shown.
      needed_by: the runs that these are for, the last one directly.

    Returns:
      None when all are there; else how the one ended that a signal stopped.

    Raises:
      ConfigError: a run that needs itself, or what `train` raises.
    """
    for name in filter(None, map(run_named, checkpoints)):
        if name in needed_by:
            raise ConfigError(f"needs itself: {' -> '.join((*needed_by, name))}", source=name)
        run_dir = default_run_dir(name)
        config = _config(name, run_dir)
        if finished_figures(config, epath.Path(run_dir), steps(run_dir)) is not None:
            continue
        stopped = train_needed(checkpoints_of(config), console, needed_by=(*needed_by, name))
        if stopped is not None:
            return stopped
        printer(console)(f"first {name}, whose model is needed: into {run_dir}")
        outcome = train(config, run_dir, console)
        if outcome.figures is None or outcome.exit_code:
            return outcome
    return None


def _config(name: str, run_dir: Path) -> RunConfig:
    file = run_dir / CONFIG_FILE
    return load_run_config(str(file) if steps(run_dir) and file.is_file() else name)
