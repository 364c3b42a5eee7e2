"""The tables of a TOML file that rejection sampling and rounds read, and what they build."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from llama_jax.config.loading import (
    ConfigError,
    NotNegative,
    Positive,
    Range,
    apply_overrides,
    check_ranges,
    from_table,
    read_toml,
)
from llama_jax.config.run import DType, MeshConfig
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.sampling_choice import Wishes
from llama_jax.synthesis.answers import ExactAnswer
from llama_jax.synthesis.code_tests import CodeTests
from llama_jax.synthesis.critic import TEMPLATE, Criticism
from llama_jax.synthesis.rejection import Drawing
from llama_jax.synthesis.sampling import DEFAULT_K
from llama_jax.synthesis.selecting import Keeping, Pairs
from llama_jax.synthesis.verdicts import Pattern

VerifierConfig = ExactAnswer | CodeTests | Pattern


@dataclasses.dataclass(frozen=True)
class OpeningTable:
    """How a model is opened."""

    # Prompts are users' messages, in the model's chat format; else texts to continue.
    chat: bool = True
    chat_format: str | None = None
    dtype: DType | None = None
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.chat_format is not None and not self.chat:
            raise ConfigError("needs chat = true", key="chat_format")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTable(OpeningTable):
    """A model and how it is opened."""

    path: str


@dataclasses.dataclass(frozen=True)
class DrawingTable:
    """How samples are drawn; what isn't given is the model's own."""

    temperature: Annotated[float, NotNegative] | None = None
    top_k: Annotated[int, Positive] | None = None
    top_p: Annotated[float, Range(above=0.0, at_most=1.0)] | None = None
    min_p: Annotated[float, Range(at_least=0.0, at_most=1.0)] | None = None
    repetition_penalty: Annotated[float, Positive] | None = None
    presence_penalty: Annotated[float, Range(at_least=-2.0, at_most=2.0)] | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: Annotated[int, Positive] | None = None
    batch_size: Annotated[int, Positive] = 8
    seed: Annotated[int, Range(at_least=0, at_most=2**32 - 1)] = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        # What doesn't go together is told before a model is loaded.
        names = [field.name for field in dataclasses.fields(Sampling)]
        given = {n: v for n, v in vars(self).items() if n in names and v is not None}
        Sampling(**{"max_new_tokens": 1, **given})

    def wishes(self) -> Wishes:
        """For `inference`."""
        names = {field.name for field in dataclasses.fields(Wishes)}
        given = {name: value for name, value in vars(self).items() if name in names}
        return Wishes(**given, stop_strings=self.stop)

    def drawing(self, k: int) -> Drawing:
        """`k` samples so drawn."""
        return Drawing(k, self.wishes(), self.max_new_tokens, self.batch_size)


@dataclasses.dataclass(frozen=True)
class KeepingTable:
    """Which samples are kept, and what makes a pair; see `selecting.Keeping`."""

    pairs: Pairs | None = None
    min_score: float | None = None
    truncated: bool = False

    def check(self, *, verified: bool, scored: bool) -> None:
        """Raise `ConfigError` for a rule that needs what isn't made, before anything is."""
        if self.min_score is not None and not scored:
            raise ConfigError("nothing is scored", key="min_score")
        if self.pairs == "right_wrong" and not verified:
            raise ConfigError("'right_wrong' needs a verifier", key="pairs")
        if self.pairs == "best_worst" and not scored:
            raise ConfigError("'best_worst' needs a reward model", key="pairs")

    def keeping(self) -> Keeping:
        """As selecting takes it."""
        return Keeping(self.pairs, self.min_score, self.truncated)


@dataclasses.dataclass(frozen=True)
class CriticTable:
    """What corrects poor answers: a model, by default the one sampled, or a file of edits."""

    model: ModelTable | None = None
    edits: str | None = None
    threshold: float | None = None
    tries: Annotated[int, Positive] = 4
    tell_reasons: bool = False
    template: str | None = None  # a file, with {question} and {answer}
    draw: DrawingTable = DrawingTable()

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.tries > 1 and self.draw.temperature == 0:
            raise ConfigError(
                f"{self.tries} corrections would all be the same at 0", key="draw.temperature"
            )
        if self.edits is not None:
            unused = ("model", "tries", "tell_reasons", "template", "draw")
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            for key in unused:
                if getattr(self, key) != defaults[key]:
                    raise ConfigError("has no meaning for edits that people wrote", key=key)

    def check(self, *, verified: bool, scored: bool) -> None:
        """Raise `ConfigError` where corrections couldn't be judged, or a file isn't there."""
        if not (verified or scored):
            raise ConfigError("corrections need a reward model or a verifier to be held against")
        if self.threshold is not None and not scored:
            raise ConfigError("nothing is scored", key="threshold")
        if self.edits is not None and not Path(self.edits).is_file():
            raise ConfigError("No such file", key="edits", source=self.edits)

    def criticism(self) -> Criticism:
        """As the critic takes it.

        Raises:
          ConfigError: a template that can't be read or lacks a field.
        """
        return Criticism(
            self.threshold,
            self.tries,
            self.draw.wishes(),
            self.tell_reasons,
            self.draw.max_new_tokens,
            self.draw.batch_size,
            TEMPLATE if self.template is None else _read(self.template),
        )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """A file of `llama-jax sample`."""

    prompts: str
    model: ModelTable
    # Samples of each prompt; the Llama 3 paper takes 10 to 30.
    k: Annotated[int, Positive] = DEFAULT_K
    system: str | None = None
    draw: DrawingTable = DrawingTable()
    verifiers: tuple[VerifierConfig, ...] = ()
    reward: ModelTable | None = None  # a reward model
    keep: KeepingTable = KeepingTable()
    critic: CriticTable | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.k > 1 and self.draw.temperature == 0:
            raise ConfigError(
                f"{self.k} samples would all be the same at 0", key="draw.temperature"
            )
        if self.k > 1 and not self.verifiers and self.reward is None:
            raise ConfigError(
                f"{self.k} samples of a prompt need verifiers or a reward model to choose by",
                key="k",
            )
        if self.system is not None and not self.model.chat:
            raise ConfigError("needs model.chat = true", key="system")
        if self.reward is not None and not self.reward.chat:
            raise ConfigError("a reward model reads conversations", key="reward.chat")
        made = {"verified": bool(self.verifiers), "scored": self.reward is not None}
        _check_within("keep", lambda: self.keep.check(**made))
        if self.critic is not None:
            critic = self.critic
            _check_within("critic", lambda: critic.check(**made))
            critic.criticism()


def load_sampling_config(path: Path, overrides: tuple[str, ...] = ()) -> SamplingConfig:
    """A file of `llama-jax sample`, with `--set` overrides applied.

    Raises:
      ConfigError: naming the file and the field.
    """
    table = apply_overrides(read_toml(path), overrides)
    return from_table(SamplingConfig, table, str(path))


def _check_within(key: str, check: Callable[[], None]) -> None:
    try:
        check()
    except ConfigError as error:
        raise error.within(key, "") from None


def _read(template: str) -> str:
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(reason, key="template", source=template) from None
