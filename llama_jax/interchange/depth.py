"""A checkpoint seen with some of its layers only: what a student of less depth starts from."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import ModelConfig
from llama_jax.interchange.checking import check_structure
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.source import Source
from llama_jax.interchange.tensors import StoredTensor, canonical_shapes
from llama_jax.tokenizers import Tokenizer


class WithLayers:
    """A source whose layer i is layer `layers[i]` of another; the rest of it is as it was.

    Llama 3.2's 1B and 3B began so, as larger models with layers left out, before they were
    distilled (model card of Llama 3.2).

    Args:
      source: opened.
      layers: numbers of its layers, from 0, rising.

    Raises:
      ConfigError: a layer that it doesn't have.
      InterchangeError: a tensor of it that is missing, too many or misshapen.
    """

    def __init__(self, source: Source, layers: Sequence[int]) -> None:
        count = source.config.num_layers
        if max(layers) >= count:
            raise ConfigError(
                f"layer {max(layers)}, but {source.path} has {count}, counted from 0",
                key="init.layers",
            )
        check_structure(source)
        self._source = source
        self._layers = tuple(layers)
        self.config: ModelConfig = dataclasses.replace(source.config, num_layers=len(layers))
        # By canonical name, those of the layers renamed.
        self.tensors: Mapping[str, StoredTensor] = {
            name: dataclasses.replace(source.tensors[self._source_name(name)], name=name)
            for name in canonical_shapes(self.config)
        }

    @property
    def format(self) -> str:
        """The other source's, as are the rest."""
        return self._source.format

    @property
    def path(self) -> Path:
        """The folder or file."""
        return self._source.path

    @property
    def chat_template(self) -> str | None:
        """Jinja source."""
        return self._source.chat_template

    @property
    def generation(self) -> GenerationDefaults:
        """Stop ids and sampling defaults."""
        return self._source.generation

    def stored_name(self, name: str) -> str:
        """What the format calls the tensor."""
        return self._source.stored_name(self._source_name(name))

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that lies with it."""
        return self._source.load_tokenizer()

    def _source_name(self, name: str) -> str:
        if not name.startswith("layers."):
            return name
        _, number, rest = name.split(".", 2)
        return f"layers.{self._layers[int(number)]}.{rest}"
