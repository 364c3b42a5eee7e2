"""Training as a stage: a run's file whose `@name` strings are artifacts of the rounds."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError, from_table, to_table
from llama_jax.config.run import RunConfig
from llama_jax.recipes.fingerprints import RecipeError
from llama_jax.recipes.settings import TrainTable
from llama_jax.recipes.stages import Context, Result, Stage

_MARK = "@"
# Figures of a finished run that reports show.
_SHOWN = ("step", "loss", "held_out")


class StoppedError(RecipeError):
    """A signal stopped a run after it was saved; the same call goes on."""

    def __init__(self, run_dir: Path, exit_code: int) -> None:
        super().__init__(f"{run_dir}: stopped and saved; the same command goes on")
        self.exit_code = exit_code


def training_stage(name: str, table: TrainTable, *, makes: str, key: str) -> Stage:
    """A stage that trains each of its variants from a model of the rounds.

    Args:
      name: of the stage.
      table: its file and variants.
      makes: the artifact that the first variant's model becomes; variant i is `name_i` too.
      key: the table's place, for messages.

    Raises:
      ConfigError: a file that can't be used, or one that begins with no model of the rounds.
    """
    runs = [load_run_config(table.run, [*table.set, *v.set]) for v in table.variants]
    wanted: set[str] = set()
    used: set[str] = set()
    for run in runs:
        if run.init is None or not run.init.path.startswith(_MARK):
            raise ConfigError(
                "begins with no model of the rounds; set init.path to '@model' or '@start'",
                key=key,
                source=table.run,
            )
        needs, uses = _artifacts(run)
        wanted |= needs
        used |= uses
    numbered = [f"{name}_{i}" for i in range(1, len(runs) + 1)]

    def train_all(context: Context) -> Result:
        paths, figures = {}, {}
        for number, run in zip(numbered, runs, strict=True):
            paths[number], figures[number] = _train(run, context, context.folder / number)
        shown = figures if len(runs) > 1 else figures[numbered[0]]
        return Result({makes: paths[numbered[0]], **paths}, shown)

    return Stage(
        name=name,
        needs=tuple(sorted(wanted)),
        uses=tuple(sorted(used - wanted)),
        makes=(makes, *numbered),
        run=train_all,
        settings={"runs": [to_table(run) for run in runs]},
    )


def resolved(config: RunConfig, inputs: Mapping[str, Path]) -> RunConfig:
    """The run with paths in place of its `@name` strings, without sources that aren't there yet."""
    table = to_table(config)
    data = table["data"]
    for part in ("sources", "held_out"):
        data[part] = [s for s in data[part] if set(_marks(s)) <= inputs.keys()]
    return from_table(RunConfig, _replaced(table, inputs), "rounds")


def _train(run: RunConfig, context: Context, run_dir: Path) -> tuple[Path, dict[str, Any]]:
    # Here, not above: the module that trains loads everything.
    from rich.console import Console

    from llama_jax.training.run import train

    outcome = train(resolved(run, context.inputs), run_dir, Console(stderr=True))
    # Also where the signal came at the last step: whoever sent it wants the rounds to stop.
    if outcome.figures is None or outcome.exit_code:
        raise StoppedError(run_dir, outcome.exit_code)
    figures = {name: outcome.figures[name] for name in _SHOWN if outcome.figures.get(name)}
    return run_dir / "checkpoints" / f"step_{outcome.step}", figures


def _artifacts(run: RunConfig) -> tuple[set[str], set[str]]:
    """What a run can't be without, and what it takes where it is there."""
    table = to_table(run)
    sources = table["data"]["sources"]
    optional = {mark for source in sources for mark in _marks(source)}
    optional |= {mark for source in table["data"]["held_out"] for mark in _marks(source)}
    rest = {**table, "data": {**table["data"], "sources": [], "held_out": []}}
    needed = set(_marks(rest))
    if all(any(_marks(source)) for source in sources):
        # Without any of these there is nothing to train on.
        needed |= set(_marks(sources[0]))
    return needed, optional


def _marks(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.startswith(_MARK):
        yield value.removeprefix(_MARK)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _marks(item)
    elif isinstance(value, list):
        for item in value:
            yield from _marks(item)


def _replaced(value: Any, inputs: Mapping[str, Path]) -> Any:
    if isinstance(value, str) and value.startswith(_MARK):
        return str(inputs[value.removeprefix(_MARK)].absolute())
    if isinstance(value, Mapping):
        return {key: _replaced(item, inputs) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, inputs) for item in value]
    return value
