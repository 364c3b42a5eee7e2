"""A model of any format, opened for generating: its files, weights on a mesh, tokenizer, chat."""

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Literal

import jax

from llama_jax.config.loading import ConfigError, apply_overrides, from_table, nearest
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.inference.generator import Generator
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.source import Source, source_chat_format
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers import Tokenizer
from llama_jax.tokenizers.chat import FORMATS, ChatFormat

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Placement:
    """What `--set` can change."""

    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True)
class Session:
    """An opened model with what it takes to generate; `chat_format` where it was asked for."""

    source: Source
    tokenizer: Tokenizer
    generator: Generator
    chat_format: ChatFormat | None

    def token_name(self, stop: int | str | None) -> str | None:
        """The name of a special token by its id; a text is its own."""
        if not isinstance(stop, int):
            return stop
        names = {token_id: name for name, token_id in self.tokenizer.special.items()}
        return names.get(stop)

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and its continuation together."""
        return self.source.config.max_seq_len


def open_session(
    path: str,
    *,
    chat: bool,
    chat_format: str | None = None,
    date: datetime.date | None = None,
    dtype: DType | None = None,
    overrides: Sequence[str] = (),
    batch_size: int = 8,
    adapter: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Session:
    """Open, check and load the model at `path`.

    Args:
      path: as `interchange.open_source` takes it.
      chat: whether a chat format is wanted.
      chat_format: its name; by default that which a run was trained with, the template of the
        model's files, or by its vocabulary.
      date: today, for the formats that tell it.
      dtype: of parameters and computation; by default that of `default_dtype`.
      overrides: `mesh.axis=size` assignments.
      batch_size: completions made at once.
      adapter: merged into the model, as `interchange.opening.open_adapter` takes it.
      progress: told the bytes read and those in all.

    Raises:
      InterchangeError, TokenizerError, ChatError, ConfigError: each names what is wrong. All but
        those of the tensors come before any of these is read.
    """
    if chat_format is not None and chat_format not in FORMATS:
        wrong = f"unknown chat format '{chat_format}'{nearest(chat_format, FORMATS)}"
        raise ConfigError(wrong, key="--chat-format")
    placement = from_table(Placement, apply_overrides({}, overrides), "--set")
    source = open_source(path, adapter=adapter)
    if source.config.head != "vocab":
        raise ConfigError(
            "a reward model scores text, it doesn't generate", source=str(source.path)
        )
    tokenizer = source.load_tokenizer()
    chosen = None
    if chat:
        chosen = source_chat_format(source, tokenizer, name=chat_format, date=date)
    mesh = make_mesh(placement.mesh)
    dtype = dtype or default_dtype()
    execution = ExecutionConfig(param_dtype=dtype, compute_dtype=dtype, remat="none")
    model = load_model(source, execution, mesh, progress=progress)
    generator = Generator(model, tokenizer, mesh, batch_size=batch_size)
    return Session(source, tokenizer, generator, chosen)


def default_dtype() -> DType:
    """float32 on CPUs, which emulate bfloat16 slowly; bfloat16 elsewhere, the models' own."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
