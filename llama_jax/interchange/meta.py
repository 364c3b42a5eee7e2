"""Meta's own checkpoints: `params.json`, `consolidated.NN.pth` and `tokenizer.model`."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import ModelConfig
from llama_jax.interchange.generation_defaults import GenerationDefaults, from_generation_config
from llama_jax.interchange.hugging_face import GENERATION_FILE, read_chat_template
from llama_jax.interchange.json_files import read_json
from llama_jax.interchange.meta_names import to_meta
from llama_jax.interchange.meta_params import config_from_params
from llama_jax.interchange.meta_shards import joined_tensors, rank_files, stored
from llama_jax.interchange.tensors import (
    EMBEDDING,
    LM_HEAD,
    InterchangeError,
    StoredTensor,
    pieces,
)
from llama_jax.tokenizers import Tokenizer, TokenizerError, load_tokenizer

PARAMS_FILE = "params.json"


@dataclasses.dataclass(frozen=True)
class MetaSource:
    """An opened folder in Meta's layout. Satisfies `Source`.

    Meta's files say nothing of chat templates and generation; what `write_meta` puts beside them
    is read, else a completion ends with the tokenizer's end of text.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    chat_template: str | None
    format: str = "meta"

    @property
    def generation(self) -> GenerationDefaults:
        """Of `generation_config.json`, or the tokenizer's end of text."""
        return self._generation

    @cached_property
    def _generation(self) -> GenerationDefaults:
        # Kept, since a real tokenizer takes seconds to read.
        file = self.path / GENERATION_FILE
        if file.is_file():
            defaults = from_generation_config(read_json(file), str(file))
        else:
            defaults = _from_tokenizer(self.path)
        defaults.check_ids(self.config.vocab_size, str(file))
        return defaults

    def stored_name(self, name: str) -> str:
        """Meta's name of a canonical one."""
        return to_meta(name)

    def load_tokenizer(self) -> Tokenizer:
        """The `tokenizer.model` of either kind, or other tokenizer files, in the folder.

        Raises:
          TokenizerError: there is none, or one that can't be read.
        """
        return load_tokenizer(self.path)


def open_meta(folder: Path) -> MetaSource:
    """Open a folder in Meta's layout, of one rank or several.

    A stored head that equals the embedding is taken as tied to it: nothing in the files says so.
    For this alone values are read, of both until they differ.

    Raises:
      InterchangeError: PyTorch isn't installed; a file is missing, truncated or holds more than
        tensors; ranks that don't belong together.
      ConfigError: a key of `params.json` that is missing, wrong or unknown.
    """
    file = folder / PARAMS_FILE
    params = read_json(file)
    # Read once without the vocabulary, for the widths that tell how tensors were cut.
    dims = config_from_params(params, str(file), vocab_size=1, tie_embeddings=True)
    joined = joined_tensors(rank_files(folder), dims.embed_dim, dims.num_kv_heads * dims.head_dim)
    tensors = {(tensor := stored(each, dims.head_dim)).name: tensor for each in joined}
    _check_ffn(file, dims.mlp_dim, tensors)
    rows = _vocab_size(folder, params, tensors)
    tied = LM_HEAD not in tensors or _same(tensors[LM_HEAD], tensors[EMBEDDING])
    if tied:
        tensors.pop(LM_HEAD, None)
    config = config_from_params(params, str(file), vocab_size=rows, tie_embeddings=tied)
    return MetaSource(folder, config, tensors, read_chat_template(folder))


def _check_ffn(file: Path, mlp_dim: int, tensors: dict[str, StoredTensor]) -> None:
    gate = tensors.get("layers.0.mlp.gate_proj")
    if gate is not None and gate.shape[0] != mlp_dim:
        raise ConfigError(
            f"multiple_of and ffn_dim_multiplier give an MLP {mlp_dim} wide, but "
            f"{gate.stored_name} has {gate.shape[0]} rows",
            source=str(file),
        )


def _vocab_size(folder: Path, params: dict[str, Any], tensors: dict[str, StoredTensor]) -> int:
    """Rows of the embedding, held against the file or, where that says -1, the tokenizer."""
    if EMBEDDING not in tensors:
        raise InterchangeError(f"{folder}: no tensor {to_meta(EMBEDDING)}")
    rows = tensors[EMBEDDING].shape[0]
    stated, by = params.get("vocab_size", -1), "vocab_size"
    if stated == -1:
        stated, by = _tokenizer_size(folder), "vocab_size is -1, and the tokenizer's"
    if stated is not None and stated != rows:
        raise ConfigError(
            f"{by} {stated} contradicts the {rows} rows of {to_meta(EMBEDDING)}",
            source=str(folder / PARAMS_FILE),
        )
    return rows


def _tokenizer_size(folder: Path) -> int | None:
    tokenizer = _tokenizer_beside(folder)
    return None if tokenizer is None else tokenizer.vocab_size


def _tokenizer_beside(folder: Path) -> Tokenizer | None:
    """The tokenizer, where there is one; a broken one is an error when it is asked for."""
    try:
        return load_tokenizer(folder)
    except TokenizerError:
        return None


def _from_tokenizer(folder: Path) -> GenerationDefaults:
    tokenizer = _tokenizer_beside(folder)
    if tokenizer is None:
        return GenerationDefaults()
    return GenerationDefaults(stop_ids=frozenset({tokenizer.eos_id}), bos_id=tokenizer.bos_id)


def _same(head: StoredTensor, embedding: StoredTensor) -> bool:
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    # A few rows first: heads that aren't tied differ there.
    few = (slice(0, min(8, head.shape[0])), slice(0, head.shape[1]))
    parts = [few, *pieces(head.shape, head.dtype.itemsize)]
    return all(np.array_equal(head.read(part), embedding.read(part)) for part in parts)
