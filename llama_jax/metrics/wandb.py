"""Weights & Biases, when a project is named and its package is installed."""

import importlib
from collections.abc import Mapping
from typing import Any

from llama_jax.config.loading import ConfigError


class WandbWriter:
    """Scalars by step into one W&B run, which a restart continues under the same id.

    Raises:
      ConfigError: the package is not installed.
    """

    def __init__(self, project: str, run_id: str, config: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise ConfigError(
                f"'{project}' asks for Weights & Biases, whose package isn't installed; "
                "install it (pip install wandb) or leave the key out",
                key="metrics.wandb_project",
            ) from None
        self._run = wandb.init(
            project=project, id=run_id, name=run_id, config=dict(config), resume="allow"
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the scalars of one step."""
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
