"""Training as a stage: a run's file whose `@name` strings are artifacts of the rounds."""

from pathlib import Path
from typing import Any

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError, to_table
from llama_jax.config.run import RunConfig
from llama_jax.recipes.fingerprints import RecipeError
from llama_jax.recipes.run_artifacts import (
    MARK,
    PARTS,
    artifacts_of,
    empty_sources,
    resolved,
    sources_left,
)
from llama_jax.recipes.settings import TrainTable
from llama_jax.recipes.stages import Context, Result, Stage

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
        if run.init is None or not run.init.path.startswith(MARK):
            raise ConfigError(
                "begins with no model of the rounds; set init.path to '@model' or '@start'",
                key=key,
                source=table.run,
            )
        needs, uses = artifacts_of(run)
        wanted |= needs
        used |= uses
    numbered = [f"{name}_{i}" for i in range(1, len(runs) + 1)]

    def train_all(context: Context) -> Result:
        for run in runs:
            if not sources_left(run, context.inputs):
                return Result(skipped="; ".join(empty_sources(run, context.inputs, "sources")))
        empty = (
            r for run in runs for part in PARTS for r in empty_sources(run, context.inputs, part)
        )
        for reason in dict.fromkeys(empty):
            context.say(f"{name}: left out: {reason}")
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
        stays=(makes,),
        trains=True,
        run=train_all,
        settings={"runs": [to_table(run) for run in runs]},
    )


def train_first(checkpoints: list[str]) -> None:
    """Train the runs among `checkpoints` (`run:NAME`) that aren't finished.

    Raises:
      StoppedError: a signal stopped one.
    """
    from rich.console import Console

    from llama_jax.training.needed_runs import train_needed

    stopped = train_needed(checkpoints, Console(stderr=True))
    if stopped is not None:
        raise StoppedError(Path(stopped.run_dir), stopped.exit_code)


def _train(run: RunConfig, context: Context, run_dir: Path) -> tuple[Path, dict[str, Any]]:
    # Here, not above: the module that trains loads everything.
    from rich.console import Console

    from llama_jax.training.needed_runs import checkpoints_of
    from llama_jax.training.run import train

    run = resolved(run, context.inputs)
    train_first(checkpoints_of(run))
    outcome = train(run, run_dir, Console(stderr=True))
    # Also where the signal came at the last step: whoever sent it wants the rounds to stop.
    if outcome.figures is None or outcome.exit_code:
        raise StoppedError(run_dir, outcome.exit_code)
    figures = {name: outcome.figures[name] for name in _SHOWN if outcome.figures.get(name)}
    return run_dir / "checkpoints" / f"step_{outcome.step}", figures
