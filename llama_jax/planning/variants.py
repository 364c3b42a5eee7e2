"""A run with fields changed, which are named as `--set` names them."""

from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.config.loading import apply_overrides, from_table, to_table, to_toml
from llama_jax.config.run import RunConfig

Changes = dict[str, Any]
# From most memory to least.
REMAT_PRESETS = ("none", "dots", "block", "attention", "full")


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The run with these fields set.

    Raises:
      ConfigError: a combination that isn't allowed.
    """
    overrides = [f"{key}={_toml(value)}" for key, value in changes.items()]
    return from_table(RunConfig, apply_overrides(to_table(config), overrides), "--set")


def describe(changes: Mapping[str, Any]) -> str:
    """`--set execution.remat=full --set training.microbatches=2`, to copy into a shell."""
    parts = [
        f"--set {key}={value if isinstance(value, str) else _toml(value)}"
        for key, value in changes.items()
    ]
    return " ".join(parts) or "as it is"


def powers_of_two(limit: int) -> Iterator[int]:
    """1, 2, 4, ... up to the limit."""
    value = 1
    while value <= limit:
        yield value
        value *= 2


def _toml(value: Any) -> str:
    return to_toml({"value": value}).partition(" = ")[2].strip()
