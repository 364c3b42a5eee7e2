"""Where a run's data comes from, and how it is laid into rows: the `data` table of a run's file."""

import dataclasses
from typing import Annotated, Literal

from llama_jax.config.loading import (
    ConfigError,
    Fraction,
    NotNegative,
    Positive,
    Range,
    check_ranges,
)

Part = Literal["all", "train", "held_out"]
# How much better than the other a response was judged, strongest first.
Strength = Literal["significantly", "better", "slightly", "marginally"]
STRENGTHS: tuple[Strength, ...] = ("significantly", "better", "slightly", "marginally")
# What the batches of a run hold: packed text, conversations among it, or preferences alone.
DataKind = Literal["text", "conversations", "preferences"]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Raw text: a file, a directory, a glob, or `stdlib` (this Python's own library sources)."""

    path: str
    # Field of .jsonl and Parquet records.
    text_field: str = "text"
    # Suffixes taken from a directory.
    suffixes: tuple[str, ...] = (
        *(".txt", ".md", ".py"),
        *(".jsonl", ".jsonl.gz", ".jsonl.zst"),
        ".parquet",
    )
    # Files, or whole top-level modules of `stdlib`, are kept aside by a hash of their name.
    part: Part = "all"
    held_out_fraction: Annotated[float, Fraction] = 0.05
    # Stop after this many bytes of text; None takes all.
    max_bytes: Annotated[int, Positive] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class RecordsConfig:
    """Records of any kind: JSON lines (also .gz and .zst), a list in a .json file, Parquet."""

    path: str  # a file, a directory or a glob
    # A record is kept aside by a hash of the first user's text: what answers one question, several
    # records perhaps, falls into one part.
    part: Part = "all"
    held_out_fraction: Annotated[float, Fraction] = 0.05
    # Stop after this many records of the part; None takes all.
    max_records: Annotated[int, Positive] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class PromptsConfig(RecordsConfig):
    """Prompts to sample from: `prompt` (text or messages) or `messages`; other fields are kept."""

    prompt_field: str = "prompt"
    answer_field: str = "answer"  # the reference answer, where a record has one
    tests_field: str = "tests"  # a text or a list of texts, where a record has them


@dataclasses.dataclass(frozen=True)
class ConversationsConfig(RecordsConfig):
    """Conversations, trained on in what the assistant wrote, ends of its turns included."""

    # openai: `messages`. sharegpt: `conversations` of `from` and `value`. completion: a prompt and
    # what follows it. preferences: each record's best response. auto: by the fields of each record.
    form: Literal["auto", "openai", "sharegpt", "completion", "preferences"] = "auto"
    prompt_field: str = "prompt"  # of completion
    completion_field: str = "completion"
    # Of preferences: only the responses that were edited, or the best of each record.
    preferred: Literal["edited", "best"] = "edited"
    # What the assistant wrote in every turn, or after the last user's message only.
    train_on: Literal["all", "last"] = "all"
    # A conversation longer than a row loses whole turns, at its end or at its start (but never the
    # system message), or is left out: so are those that would lose all that is trained on.
    truncate: Literal["end", "start", "drop"] = "end"
    # By name, or a jinja file; neither takes the template that lies with the tokenizer, as `chat`
    # does, or without one the format that the vocabulary is made for.
    chat_format: str | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        _check_chat(self.chat_format, self.chat_template)
        if self.form not in ("auto", "preferences") and self.preferred != "edited":
            raise ConfigError(f"has no meaning for form '{self.form}'", key="preferred")
        renamed = (self.prompt_field, self.completion_field) != ("prompt", "completion")
        if renamed and self.form not in ("auto", "completion"):
            raise ConfigError(f"has no meaning for form '{self.form}'", key="prompt_field")


@dataclasses.dataclass(frozen=True)
class PreferencesConfig(RecordsConfig):
    """Responses to one prompt with a ranking; also `chosen` and `rejected`, of text or messages."""

    # A prompt whose responses don't fit a row loses its oldest turns, or the record is left out.
    truncate: Literal["start", "drop"] = "start"
    # The strength of records that don't say, and the strengths taken (Llama 3 takes two of them).
    strength: Strength = "better"
    strengths: tuple[Strength, ...] = STRENGTHS
    # A record's prompt stands once and its shuffled responses behind it, all one segment (Llama 3's
    # reward model); else each response has its own copy of the prompt and sees no other response.
    shared_prompt: bool = False
    # Ends of turns don't count in a response's log-probability (Llama 3's DPO); headers never do.
    mask_formatting: bool = True
    # Adds to each record another record's response, for KTO's estimate of the divergence.
    mismatched: bool = False
    chat_format: str | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        _check_chat(self.chat_format, self.chat_template)
        if not self.strengths:
            raise ConfigError("name at least one strength", key="strengths")
        if self.shared_prompt and self.mismatched:
            raise ConfigError(
                "a mismatched response would see the others behind a shared prompt",
                key="mismatched",
            )


def _check_chat(chat_format: str | None, chat_template: str | None) -> None:
    if chat_template is not None and chat_format not in (None, "template"):
        raise ConfigError("give one of chat_format and chat_template", key="chat_template")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source: `shards` built by `data build`, or what is built on first use."""

    name: str
    weight: Annotated[float, Positive] = 1.0  # share of tokens, relative to the other sources
    shards: str | None = None
    text: TextConfig | None = None
    conversations: ConversationsConfig | None = None
    preferences: PreferencesConfig | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        given = (self.shards, self.text, self.conversations, self.preferences)
        if sum(part is not None for part in given) != 1:
            raise ConfigError(
                "give one of shards, text, conversations and preferences", key="shards"
            )

    @property
    def kind(self) -> DataKind:
        """What it holds."""
        if self.preferences is not None:
            return "preferences"
        return "text" if self.conversations is None else "conversations"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Packed token batches."""

    seq_len: Annotated[int, Positive]  # T
    batch_size: Annotated[int, Positive]  # B, sequences a step over all hosts and microbatches
    sources: tuple[SourceConfig, ...]
    held_out: tuple[SourceConfig, ...] = ()
    # `concat` joins and cuts documents; `best_fit` keeps them whole; `none` gives each a row.
    packing: Literal["concat", "best_fit", "none"] = "concat"
    # R, responses and pairs that a row of preferences has room for.
    responses_per_row: Annotated[int, Range(at_least=2, at_most=255)] = 8
    workers: Annotated[int, NotNegative] = 0  # processes that read and pack; 0 reads in a thread
    prefetch: Annotated[int, Positive] = 4  # batches ready ahead of the step

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.sources:
            raise ConfigError("at least one source is needed", key="sources")
        for key in ("sources", "held_out"):
            names = [source.name for source in getattr(self, key)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ConfigError(f"two sources are called '{twice[0]}'", key=key)
        self._check_kinds()

    @property
    def kind(self) -> DataKind:
        """What its batches hold."""
        kinds = {source.kind for source in self.sources}
        order: tuple[DataKind, ...] = ("preferences", "conversations", "text")
        return next(kind for kind in order if kind in kinds)

    @property
    def first_records(self) -> ConversationsConfig | PreferencesConfig | None:
        """The first source that holds conversations or preferences; it says how to chat."""
        held = (source.conversations or source.preferences for source in self.sources)
        return next(filter(None, held), None)

    def _check_kinds(self) -> None:
        for key in ("sources", "held_out"):
            for source in getattr(self, key):
                if (source.kind == "preferences") != (self.kind == "preferences"):
                    raise ConfigError(
                        f"'{source.name}' holds {source.kind}; a run reads either preferences or"
                        " text and conversations",
                        key=key,
                    )
        if self.packing == "concat" and self.kind != "text":
            raise ConfigError(
                f"'concat' would cut {self.kind}; use 'best_fit' or 'none'", key="packing"
            )
