"""Writing a folder that transformers and vLLM load as it is."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_jax.interchange.casting import dtype_named
from llama_jax.interchange.generation_defaults import to_generation_config
from llama_jax.interchange.hugging_face import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    SINGLE_FILE,
)
from llama_jax.interchange.hugging_face_config import to_config_json
from llama_jax.interchange.hugging_face_names import to_hugging_face
from llama_jax.interchange.json_files import write_json
from llama_jax.interchange.safetensors_writing import Plan, write_safetensors
from llama_jax.interchange.source import Source
from llama_jax.interchange.tensors import (
    DTYPES,
    REWARD_HEAD,
    Slices,
    StoredTensor,
    canonical_shapes,
)
from llama_jax.tokenizers import Tokenizer
from llama_jax.tokenizers.chat.template_files import TEMPLATE_FILE

DEFAULT_SHARD_BYTES = 5 * 10**9


def write_hugging_face(
    source: Source,
    folder: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Config, generation config, tokenizer, chat template and weights of `source` into `folder`.

    Works on the host alone, tensor by tensor. A tied model gets no head tensor.

    Args:
      dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's own.
      shard_bytes: the most bytes of tensors in one file, but for a single larger tensor.

    Raises:
      InterchangeError: a value too large for float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = [
        Plan(to_hugging_face(name), tensor := as_hugging_face(source.tensors[name]),
             tensor.dtype if dtype is None else dtype_named(dtype))
        for name in canonical_shapes(source.config)
    ]  # fmt: skip
    write_side_files(source, folder, tokenizer)
    generation = to_generation_config(source.generation)
    token_ids = {key: value for key, value in generation.items() if key.endswith("_token_id")}
    config = to_config_json(source.config, _main_dtype(plans))
    write_json(folder / CONFIG_FILE, {**config, **token_ids})
    _write_weights(folder, plans, shard_bytes, source.config.head_dim)


def as_hugging_face(tensor: StoredTensor) -> StoredTensor:
    """The tensor in the shape that it has there: a reward head is a matrix with one row."""
    if tensor.name != REWARD_HEAD:
        return tensor

    def read(part: Slices) -> np.ndarray:
        return tensor.read(part[1:])[None][part[0]]

    return dataclasses.replace(tensor, shape=(1, *tensor.shape), read=read)


def write_side_files(source: Source, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Generation config, tokenizer files and chat template: the same for our own folders."""
    if tokenizer is not None:
        tokenizer.save(folder)
    if source.chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(source.chat_template, encoding="utf-8")
    write_json(folder / GENERATION_FILE, to_generation_config(source.generation))


def _write_weights(folder: Path, plans: Sequence[Plan], most: int, head_dim: int) -> None:
    shards = _shards(plans, most)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_FILE, plans, head_dim)
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, head_dim)
        places |= {plan.name: name for plan in shard}
    total = sum(plan.nbytes for plan in plans)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(plans: Sequence[Plan], most: int) -> list[list[Plan]]:
    """Runs of tensors of at most `most` bytes together."""
    shards: list[list[Plan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.nbytes
    return shards


def _main_dtype(plans: Sequence[Plan]) -> str:
    """That of most of the bytes, for the config."""
    sizes: collections.Counter[np.dtype] = collections.Counter()
    for plan in plans:
        sizes[plan.dtype] += plan.nbytes
    dtype = max(sizes, key=lambda kind: sizes[kind])
    return next(name for name, kind in DTYPES.items() if kind == dtype)
