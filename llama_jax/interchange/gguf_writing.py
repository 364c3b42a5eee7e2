"""Write GGUF files that llama.cpp loads with their tokenizer and chat template.

The head is made by the `gguf` package's writer, the tensors are appended piece by piece: peak
memory is a piece of `PIECE_BYTES` in float32, whatever the tensor. [O, I] is a matrix [out, in].
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION

from llama_jax.config.loading import nearest
from llama_jax.config.model import Llama3Scaling
from llama_jax.interchange import gguf_blocks, gguf_metadata
from llama_jax.interchange.casting import read_cast
from llama_jax.interchange.checking import check_structure
from llama_jax.interchange.gguf import CHAT_TEMPLATE
from llama_jax.interchange.gguf_names import ROPE_FREQS, to_gguf_name
from llama_jax.interchange.gguf_rope import divisors
from llama_jax.interchange.meta_rows import to_neighbour_pairs
from llama_jax.interchange.source import Source
from llama_jax.interchange.tensors import (
    EMBEDDING,
    InterchangeError,
    StoredTensor,
    canonical_shapes,
    head_rows,
    pieces,
)
from llama_jax.tokenizers.gguf_vocabulary import to_gguf_fields

# By the names that options use; norms and biases are float32 in any, as llama.cpp needs them.
KINDS = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16, "q8_0": Kind.Q8_0}
_FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
_UNUSED_TOKEN, _UNUSED_SCORE = 5, -1000.0


def write_gguf(source: Source, file: Path, *, dtype: str | None = None) -> None:
    """Write an opened checkpoint as one GGUF file.

    Args:
      source: of any format.
      file: is overwritten.
      dtype: a key of `KINDS`; None keeps each matrix's own (float32 for quantised ones).

    Raises:
      InterchangeError: a tensor at fault or one that the dtype can't hold; an unknown dtype.
      TokenizerError: no tokenizer, or one that GGUF has no form for.
    """
    check_structure(source)
    kinds = _kinds(source, dtype)
    tables = _tables(source)
    _write_head(source, file, kinds, tables)
    with file.open("r+b") as out:
        out.seek(0, 2)
        for table in tables.values():
            _append(out, iter([table]))
        for name, kind in kinds.items():
            _append(out, _encoded(source.tensors[name], kind, source.config.head_dim))


def _kinds(source: Source, dtype: str | None) -> dict[str, Kind]:
    """How each tensor is stored, by canonical name in the network's order."""
    if dtype is not None and dtype.lower() not in KINDS:
        raise InterchangeError(
            f"dtype '{dtype}' can't be written as GGUF{nearest(dtype, list(KINDS))}"
        )
    kinds = {}
    for name, shape in canonical_shapes(source.config).items():
        tensor = source.tensors[name]
        kind = KINDS[tensor.dtype.name if dtype is None else dtype.lower()]
        block = GGML_QUANT_SIZES[kind][0]
        if len(shape) == 2 and shape[1] % block:
            raise InterchangeError(
                f"{tensor.file}: {tensor.stored_name}: rows of {shape[1]} can't be {kind.name}, "
                f"whose blocks are {block} wide; write another dtype"
            )
        kinds[name] = kind if len(shape) == 2 else Kind.F32
    return kinds


def _tables(source: Source) -> dict[str, np.ndarray]:
    """Tensors that are no parameters: the divisors of llama3 scaling."""
    rope = source.config.rope
    if not isinstance(rope.scaling, Llama3Scaling):
        return {}
    return {ROPE_FREQS: divisors(rope.scaling, rope.theta, source.config.head_dim)}


def _write_head(
    source: Source, file: Path, kinds: dict[str, Kind], tables: dict[str, np.ndarray]
) -> None:
    writer = gguf.GGUFWriter(None, gguf_metadata.ARCHITECTURE)
    for key, value in _fields(source, kinds).items():
        _add(writer, key, value)
    for name, table in tables.items():
        writer.add_tensor_info(name, table.shape, table.dtype, table.nbytes)
    for name, kind in kinds.items():
        shape = source.tensors[name].shape
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(to_gguf_name(name), shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _fields(source: Source, kinds: dict[str, Kind]) -> dict[str, Any]:
    return {
        "general.type": "model",
        "general.name": source.path.resolve().name.removesuffix(".gguf"),
        "general.file_type": int(_FILE_TYPES[kinds[EMBEDDING]]),
        "general.quantization_version": GGML_QUANT_VERSION,
        **gguf_metadata.fields_from_config(source.config),
        **gguf_metadata.fields_from_generation(source.generation),
        **_vocabulary(source),
        **({} if source.chat_template is None else {CHAT_TEMPLATE: source.chat_template}),
    }


def _vocabulary(source: Source) -> dict[str, Any]:
    """The tokenizer's fields, filled up with unused tokens to the rows of the embedding."""
    fields = to_gguf_fields(source.load_tokenizer())
    tokens = fields["tokenizer.ggml.tokens"]
    lacking = source.config.vocab_size - len(tokens)
    if lacking < 0:
        raise InterchangeError(
            f"{source.path}: {len(tokens)} tokens for an embedding of {source.config.vocab_size} "
            "rows; llama.cpp needs a row for each"
        )
    fill = {
        "tokenizer.ggml.tokens": [f"[PAD{len(tokens) + i}]" for i in range(lacking)],
        "tokenizer.ggml.token_type": [_UNUSED_TOKEN] * lacking,
        "tokenizer.ggml.scores": [_UNUSED_SCORE] * lacking,
    }
    fields |= {key: fields[key] + more for key, more in fill.items() if key in fields}
    return fields | gguf_metadata.token_fields(source.generation, fields)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int() if key == gguf_metadata.TOP_K:
            writer.add_int32(key, value)
        case int():
            writer.add_uint32(key, value)
        case float() if key.startswith(gguf_metadata.LLAMA3):
            writer.add_float64(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _encoded(tensor: StoredTensor, kind: Kind, head_dim: int) -> Iterator[np.ndarray]:
    """The tensor's bytes, piece by piece."""
    dtype = gguf_blocks.FLOATS.get(kind, np.dtype(np.float32))
    by_heads = head_rows(tensor.name)
    for part in pieces(tensor.shape, 4, multiple=head_dim if by_heads else 1):
        values = read_cast(tensor, part, dtype)
        if by_heads:
            values = to_neighbour_pairs(values, head_dim)
        yield gguf_blocks.to_q8_0(values) if kind is Kind.Q8_0 else values


def _append(out: BinaryIO, data: Iterator[np.ndarray]) -> None:
    """One tensor's data, which begins at an aligned place as the one after it will."""
    out.write(bytes(-out.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
    for piece in data:
        out.write(piece.reshape(-1).view(np.uint8).data)
    out.write(bytes(-out.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
