"""Runs whose models others begin with: `run:NAME` in a field that names a checkpoint."""

from collections.abc import Iterable

from rich.console import Console

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError
from llama_jax.config.run import DistillConfig, RunConfig
from llama_jax.config.run_files import RESULT_FILE, default_run_dir, run_named
from llama_jax.training.notices import printer
from llama_jax.training.run import Outcome, train


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
        if (run_dir / RESULT_FILE).is_file():
            continue
        config = load_run_config(name)
        stopped = train_needed(checkpoints_of(config), console, needed_by=(*needed_by, name))
        if stopped is not None:
            return stopped
        printer(console)(f"first {name}, whose model is needed: into {run_dir}")
        outcome = train(config, run_dir, console)
        if outcome.figures is None or outcome.exit_code:
            return outcome
    return None
