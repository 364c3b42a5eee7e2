"""Finding configuration files: by path, or by the name of one that ships with the package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.config.loading import (
    ConfigError,
    apply_overrides,
    from_table,
    nearest,
    read_toml,
)
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import RunConfig


def shipped_configs() -> Path:
    """The folder of shipped configs: in a checkout `configs/`, in a wheel inside the package."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str, folder: str) -> Path:
    """The file that `name` means: a path, or a file's stem anywhere under `configs/<folder>`.

    Raises:
      ConfigError: neither, with the nearest shipped name.
    """
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        if path.is_file():
            return path
        raise ConfigError("no such file", source=name)
    shipped = {file.stem: file for file in sorted((shipped_configs() / folder).rglob("*.toml"))}
    if name not in shipped:
        raise ConfigError(
            f"no such file or shipped config{nearest(name, list(shipped))}", source=name
        )
    return shipped[name]


def load_model_config(name: str) -> ModelConfig:
    """A model by path or shipped name, such as `llama3.1-8b`."""
    path = find_config(name, "models")
    return from_table(ModelConfig, read_toml(path), str(path))


def load_run_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run by path or shipped name, with `--set` overrides applied.

    `model` is a name or path, or a table; a table's `base` names a model that it changes.
    """
    path = find_config(name, "runs")
    table = _with_model_resolved(read_toml(path), path)
    table = apply_overrides(table, overrides)
    # An override may itself name a model: --set model=llama3.1-8b.
    return from_table(RunConfig, _with_model_resolved(table, path), str(path))


def _with_model_resolved(table: dict[str, Any], source: Path) -> dict[str, Any]:
    model = table.get("model")
    if isinstance(model, str):
        model = {"base": model}
    if not isinstance(model, dict) or "base" not in model:
        return table
    changes = {key: value for key, value in model.items() if key != "base"}
    try:
        base = read_toml(find_config(str(model["base"]), "models"))
    except ConfigError as error:
        raise ConfigError(str(error), key="model", source=str(source)) from None
    return {**table, "model": {**base, **changes}}
