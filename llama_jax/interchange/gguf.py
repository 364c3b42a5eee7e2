"""GGUF files of architecture `llama`, opened lazily: floats and the common quantised blocks.

Only the head is read on opening; rows of tensors are read, and blocks dequantised, when asked for.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import Llama3Scaling, ModelConfig
from llama_jax.interchange import gguf_blocks, gguf_metadata
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.gguf_header import GGUFHeader, GGUFTensor, read_header
from llama_jax.interchange.gguf_names import ROPE_FREQS, from_gguf_name, to_gguf_name
from llama_jax.interchange.gguf_rope import scaling_of
from llama_jax.interchange.meta_rows import check_whole_heads, to_half_split
from llama_jax.interchange.tensors import (
    EMBEDDING,
    LM_HEAD,
    InterchangeError,
    Slices,
    StoredTensor,
    head_rows,
)
from llama_jax.tokenizers import Tokenizer

CHAT_TEMPLATE = "tokenizer.chat_template"


@dataclasses.dataclass(frozen=True)
class GGUFSource:
    """An opened GGUF file, or all parts of a split one. Satisfies `Source`."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    chat_template: str | None
    generation: GenerationDefaults
    fields: Mapping[str, Any]
    format: str = "gguf"

    def stored_name(self, name: str) -> str:
        """GGUF's name of a canonical one."""
        return to_gguf_name(name)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer in the metadata.

        Raises:
          TokenizerError: there is none, or one of an unknown kind.
        """
        # The vocabulary alone needs it; a conversion with other files doesn't.
        from llama_jax.tokenizers.gguf_vocabulary import from_gguf_fields

        return from_gguf_fields(self.fields)


def open_gguf(path: Path) -> GGUFSource:
    """Open a GGUF file; of a split one, any part.

    Raises:
      InterchangeError: not GGUF, truncated, a tensor of a kind that can't be read.
      ConfigError: metadata that is missing, wrong, or of another architecture.
    """
    header = read_header(path)
    for tensor in header.tensors.values():
        gguf_blocks.check_kind(tensor)
    config = _config(header)
    tensors = [
        _stored(tensor, config.head_dim)
        for name, tensor in header.tensors.items()
        if name != ROPE_FREQS
    ]
    generation = gguf_metadata.generation_from_fields(header.fields)
    generation.check_ids(config.vocab_size, str(header.path))
    return GGUFSource(
        path=header.path,
        config=config,
        tensors={tensor.name: tensor for tensor in tensors},
        chat_template=header.fields.get(CHAT_TEMPLATE),
        generation=generation,
        fields=header.fields,
    )


def _config(header: GGUFHeader) -> ModelConfig:
    names = {from_gguf_name(stored) for stored in header.tensors} - {None}
    embedding = header.tensors.get(to_gguf_name(EMBEDDING))
    if embedding is None:
        raise InterchangeError(f"{header.path}: no tensor {to_gguf_name(EMBEDDING)}")
    return gguf_metadata.config_from_fields(
        header.fields,
        str(header.path),
        vocab_size=embedding.shape[0],
        llama3=_llama3(header),
        tie_embeddings=LM_HEAD not in names,
        attention_bias=any(_is_bias(name, "attention") for name in names),
        mlp_bias=any(_is_bias(name, "mlp") for name in names),
    )


def _is_bias(name: str | None, part: str) -> bool:
    return name is not None and name.endswith("_bias") and f".{part}." in name


def _llama3(header: GGUFHeader) -> Llama3Scaling | None:
    tensor = header.tensors.get(ROPE_FREQS)
    if tensor is None:
        return None
    try:
        stated = gguf_metadata.stated_llama3(header.fields)
        theta, head_dim = (
            gguf_metadata.theta_of(header.fields),
            gguf_metadata.head_dim_of(header.fields),
        )
        given_R = gguf_blocks.read_part(tensor, tuple(slice(0, n) for n in tensor.shape))
        return scaling_of(given_R.astype(np.float32), theta, head_dim, stated)
    except ConfigError as error:
        raise error.within("", str(header.path)) from None
    except InterchangeError as error:
        raise InterchangeError(f"{header.path}: {ROPE_FREQS}: {error}") from None


def _stored(tensor: GGUFTensor, head_dim: int) -> StoredTensor:
    known = from_gguf_name(tensor.name)
    permuted = known is not None and head_rows(known)
    read = partial(gguf_blocks.read_part, tensor)
    return StoredTensor(
        name=known or tensor.name,
        stored_name=tensor.name,
        file=str(tensor.file),
        shape=tensor.shape,
        dtype=gguf_blocks.dtype_of(tensor),
        kind=tensor.kind.name,
        read=partial(_read_heads, tensor, head_dim) if permuted else read,
        has_nan=partial(gguf_blocks.has_nan, tensor),
    )


def _read_heads(tensor: GGUFTensor, head_dim: int, part: Slices) -> np.ndarray:
    """Rows of whole heads, which llama.cpp's files keep in Meta's order."""
    check_whole_heads(part[0], head_dim, f"{tensor.file}: {tensor.name}")
    return to_half_split(gguf_blocks.read_part(tensor, part), head_dim)
