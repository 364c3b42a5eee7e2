"""The file of `llama-jax rounds`: one table a stage, and what they share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from llama_jax.config.files import find_config
from llama_jax.config.loading import (
    ConfigError,
    NotNegative,
    Positive,
    Range,
    apply_overrides,
    check_ranges,
    from_table,
    nearest,
    read_toml,
)
from llama_jax.synthesis.sampling import DEFAULT_K
from llama_jax.synthesis.settings import (
    CriticTable,
    DrawingTable,
    KeepingTable,
    OpeningTable,
    VerifierConfig,
)

StageName = Literal["sft", "sample", "score", "critic", "reward", "dpo", "average", "compare"]
# Also the order, unless `stages` says another.
STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of several runs of a stage: more `--set` assignments."""

    set: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainTable:
    """A training stage: a run's file, in which `@name` stands for an artifact of the rounds.

    `@start` is the model of the beginning, `@last` that of the round before, `@model` the newest;
    `@conversations` and `@preferences` are folders of what was made. A source that names what isn't
    there yet is left out.
    """

    run: str
    set: tuple[str, ...] = ()
    # Runs that differ by these assignments, for `average`; the first one's model goes on.
    variants: tuple[Variant, ...] = (Variant(),)

    def __post_init__(self) -> None:
        if not self.variants:
            raise ConfigError("at least one, or leave it out", key="variants")


@dataclasses.dataclass(frozen=True)
class SampleTable:
    """K samples of each prompt from the newest model. The round's number is added to the seed."""

    k: Annotated[int, Positive] = DEFAULT_K
    draw: DrawingTable = DrawingTable()

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.k > 1 and self.draw.temperature == 0:
            raise ConfigError(
                f"{self.k} samples would all be the same at 0", key="draw.temperature"
            )


@dataclasses.dataclass(frozen=True)
class ScoreTable:
    """What samples are held against: verifiers, the newest reward model, or both."""

    verifiers: tuple[VerifierConfig, ...] = ()
    reward: str | None = None  # a reward model to begin with
    use_reward: bool = True  # score by the reward model where there is one
    keep: KeepingTable = KeepingTable()
    # Keep the best answers of all earlier rounds too: Llama 2 regressed without them (section
    # 3.2.3). Preferences are those of the latest round alone, as in Llama 3 (section 4.1.4).
    keep_earlier: bool = True

    def __post_init__(self) -> None:
        if self.reward is not None and not self.use_reward:
            raise ConfigError("has no meaning with use_reward = false", key="reward")


@dataclasses.dataclass(frozen=True)
class JudgingRun:
    """A run's file whose held-out data models are judged on, by its objective."""

    run: str
    set: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class AverageTable:
    """The mean of models: `sft_1`, `dpo_2` (a stage and its variant), `start`, `last`, `model`.

    Uniform, by weights, or a greedy soup: the best one and those that don't make the mean worse.
    """

    of: tuple[str, ...]
    weights: tuple[Annotated[float, NotNegative], ...] | None = None
    greedy: JudgingRun | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.of) < 2:
            raise ConfigError("at least two models", key="of")
        if self.weights is not None and len(self.weights) != len(self.of):
            raise ConfigError(f"{len(self.weights)} for {len(self.of)} models", key="weights")
        if self.weights is not None and self.greedy is not None:
            raise ConfigError("a greedy soup's weights are its own", key="weights")


@dataclasses.dataclass(frozen=True)
class CompareTable:
    """The newest model against that of the last round (or the first), a held-out prompt each."""

    judge: Literal["verifiers", "reward"] = "verifiers"
    verifiers: tuple[VerifierConfig, ...] | None = None  # None takes those of `score`
    against: Literal["last", "start"] = "last"
    margin: Annotated[float, NotNegative] = 0.0  # scores less apart tie
    draw: DrawingTable = DrawingTable()

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.margin and self.judge == "verifiers":
            raise ConfigError("has no meaning for verifiers, which give no scores", key="margin")
        if self.verifiers and self.judge == "reward":
            raise ConfigError('has no meaning with judge = "reward"', key="verifiers")


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
    """Rounds of post-training; a stage that has no table is left out."""

    start: str  # the model that the first round begins with, as `init.path`
    # One file for all rounds, or one for each; `shipped:NAME` is one that comes with the package.
    prompts: tuple[str, ...]
    rounds: Annotated[int, Positive] = 1
    held_out: str | None = None  # the prompts of `compare`
    system: str | None = None
    stages: tuple[StageName, ...] | None = None
    seed: Annotated[int, Range(at_least=0, at_most=2**31)] = 0
    model: OpeningTable = OpeningTable()
    sft: TrainTable | None = None
    sample: SampleTable | None = None
    score: ScoreTable | None = None
    critic: CriticTable | None = None
    reward: TrainTable | None = None
    dpo: TrainTable | None = None
    average: AverageTable | None = None
    compare: CompareTable | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.prompts) not in (1, self.rounds):
            raise ConfigError(
                f"{len(self.prompts)} files for {self.rounds} rounds; give one, or one a round",
                key="prompts",
            )
        for name in self.stages or ():
            if getattr(self, name) is None:
                raise ConfigError(f"stage '{name}' has no table", key="stages")
        if not self.order:
            raise ConfigError("no stages; give at least one a table", key="stages")
        self._check_compare()

    @property
    def order(self) -> tuple[StageName, ...]:
        """The stages of a round."""
        named = STAGES if self.stages is None else self.stages
        return tuple(name for name in named if getattr(self, name) is not None)

    def _check_compare(self) -> None:
        if self.compare is None or "compare" not in self.order:
            return
        if self.held_out is None:
            raise ConfigError("missing key, which compare asks", key="held_out")
        verifiers = self.compare.verifiers
        if verifiers is None:
            verifiers = self.score.verifiers if self.score else ()
        if self.compare.judge == "verifiers" and not verifiers:
            raise ConfigError("no verifiers, here or in score", key="compare.verifiers")


def load_rounds_config(
    name: str | Path, overrides: Sequence[str] = (), without: Sequence[str] = ()
) -> RoundsConfig:
    """A file of `llama-jax rounds`, with `--set` overrides and without some stages.

    Args:
      name: its path, or the name of one under `configs/rounds/`.
      overrides: `key=value` assignments.
      without: stages to leave out.

    Raises:
      ConfigError: naming the file and the field.
    """
    path = find_config(str(name), "rounds")
    table = apply_overrides(read_toml(path), overrides)
    config = from_table(RoundsConfig, table, str(path))
    for stage in without:
        if stage not in config.order:
            raise ConfigError(
                f"no stage '{stage}' to leave out{nearest(stage, config.order)}", key="--without"
            )
    left = tuple(stage for stage in config.order if stage not in without)
    try:
        return dataclasses.replace(config, stages=left)
    except ConfigError as error:
        raise error.within("", str(path)) from None
