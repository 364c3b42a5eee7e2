"""Finding configuration files: by path, or by the name of one that ships with the package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

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
    """The file that `name` means: a path, or a shipped one, with or without its folder.

    `bench/llama3.1-8b-v5e-16` and `llama3.1-8b-v5e-16` are the same file under `configs/<folder>`
    where no other folder there holds one of that name.

    Raises:
      ConfigError: neither, with the nearest shipped name; or more than one.
    """
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        if path.is_file():
            return path
        raise ConfigError("no such file", source=name)
    root = shipped_configs() / folder
    shipped = {
        file.relative_to(root).with_suffix("").as_posix(): file for file in root.rglob("*.toml")
    }
    found = sorted(known for known in shipped if name in (known, known.rpartition("/")[2]))
    if len(found) > 1:
        raise ConfigError(f"more than one shipped config: {' or '.join(found)}", source=name)
    if not found:
        stems = sorted({known.rpartition("/")[2] for known in shipped})
        raise ConfigError(f"no such file or shipped config{nearest(name, stems)}", source=name)
    return shipped[found[0]]


def load_model_config(name: str) -> ModelConfig:
    """A model by path or shipped name, such as `llama3.1-8b`."""
    path = find_config(name, "models")
    return from_table(ModelConfig, read_toml(path), str(path))


def load_run_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run by path or shipped name, with `--set` overrides applied.

    `model` is a name or path, or a table; a table's `base` names a model that it changes. The
    file's own `base` names a recipe under `configs/recipes/`, or a file beside it, whose tables it
    changes key by key.
    """
    path = find_config(name, "runs")
    table = _with_model_resolved(_with_base(path, ()), path)
    table = apply_overrides(table, overrides)
    # An override may itself name a model: --set model=llama3.1-8b.
    return from_table(RunConfig, _with_model_resolved(table, path), str(path))


def _with_base(path: Path, descendants: tuple[Path, ...]) -> dict[str, Any]:
    """A run's table laid over that of its `base`, and of the base's own."""
    table = read_toml(path)
    base = table.pop("base", None)
    if base is None:
        return table
    chain = (*descendants, path.resolve())
    try:
        if not isinstance(base, str):
            raise ConfigError(f"expected the name of a recipe or file, got {base!r}")
        found = _find_base(base, path.parent)
        if found.resolve() in chain:
            raise ConfigError(f"{found} is based on this file")
    except ConfigError as error:
        raise ConfigError(str(error), key="base", source=str(path)) from None
    return _merged(_with_base(found, chain), table)


def _find_base(name: str, folder: Path) -> Path:
    beside = folder / name
    return beside if beside.is_file() else find_config(name, "recipes")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`: tables key by key, anything else whole.

    A table of another `kind` replaces its base's, whose fields mean nothing to it.
    """
    result = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        if key == "model" and isinstance(old, str) and isinstance(value, dict):
            old = {"base": old}
        result[key] = _merged(old, value) if _same_kind(old, value) else value
    return result


def _same_kind(base: Any, changes: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return False
    return changes.get("kind", base.get("kind")) == base.get("kind")


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
