"""An opened checkpoint of any format, as loading, converting and generating see it."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from llama_jax.config.model import ModelConfig
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.tensors import InterchangeError, StoredTensor
from llama_jax.tokenizers import Tokenizer
from llama_jax.tokenizers.chat import ChatFormat, make_chat_format

__all__ = ["InterchangeError", "Source", "source_chat_format"]


class Source(Protocol):
    """An opened checkpoint. Opening reads headers and configs; tensors are read when asked for."""

    @property
    def format(self) -> str:
        """One of "hf", "meta", "gguf", "orbax" or "run"."""
        ...

    @property
    def path(self) -> Path:
        """The folder or file."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """By canonical name.

        A tensor that stands for no name of any model is under its own name, so that `check_source`
        tells it; one that a format knows to be without meaning (rotary tables) is left out.
        """
        ...

    @property
    def chat_template(self) -> str | None:
        """Jinja source, where the checkpoint has one."""
        ...

    @property
    def generation(self) -> GenerationDefaults:
        """Stop ids and sampling defaults, where the checkpoint says."""
        ...

    def stored_name(self, name: str) -> str:
        """What this format calls the tensor of a canonical name, for messages."""
        ...

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that lies with it.

        Raises:
          TokenizerError: there is none, or it can't be read.
        """
        ...


def source_chat_format(
    source: Source,
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    date: datetime.date | None = None,
) -> ChatFormat:
    """How the model of a source is asked.

    Args:
      source: opened.
      tokenizer: its.
      name: of the format; by default that which a run was trained in, the template of the source's
        files, or what the vocabulary is made for.
      date: today, for the formats that tell it.

    Raises:
      ChatError: an unknown name, or no way to tell.
      TokenizerError: the vocabulary lacks a special token of the format.
    """
    name = name or source.generation.chat_format
    return make_chat_format(tokenizer, name=name, template=source.chat_template, date=date)
