"""Tensor data of GGUF files: parts of it as arrays, scales that are no numbers, blocks to write.

A row is a run of blocks, quantised ones each with their own float16 scale; what a block means is
the `gguf` package's `quants`. A float is a block of one. [O, I] is a matrix [out, in], B a row's
bytes.
"""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES

from llama_jax.interchange.gguf_header import GGUFTensor
from llama_jax.interchange.tensors import BFLOAT16, InterchangeError, Slices, any_nan

FLOATS = {
    Kind.F32: np.dtype(np.float32),
    Kind.F16: np.dtype(np.float16),
    Kind.BF16: BFLOAT16,
}
# Where in a block its float16 scales and minima begin.
_SCALES_AT = {
    Kind.Q4_0: (0,),
    Kind.Q4_1: (0, 2),
    Kind.Q5_0: (0,),
    Kind.Q5_1: (0, 2),
    Kind.Q8_0: (0,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}
KINDS = (*FLOATS, *_SCALES_AT)
# Values dequantised at a time, so that temporaries stay small.
_PIECE = 2**20


def check_kind(tensor: GGUFTensor) -> None:
    """Raise `InterchangeError` for a type of data that can't be read."""
    if tensor.kind not in KINDS:
        known = ", ".join(kind.name for kind in KINDS)
        raise InterchangeError(
            f"{tensor.file}: {tensor.name}: {tensor.kind.name} can't be read (known: {known})"
        )


def dtype_of(tensor: GGUFTensor) -> np.dtype:
    """The stored floats' dtype; float32 for blocks."""
    return FLOATS.get(tensor.kind, FLOATS[Kind.F32])


def read_part(tensor: GGUFTensor, part: Slices) -> np.ndarray:
    """Rows and columns of a tensor of a kind in `KINDS`; only the rows are read from disk.

    Returns:
      An array in `dtype_of(tensor)`, blocks dequantised.
    """
    rows, columns = part if len(part) == 2 else (slice(0, 1), part[0])
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    first, last = columns.start // block, -(-columns.stop // block)
    data_OB = _read_rows(tensor, rows)[:, first * block_bytes : last * block_bytes]
    x_OI = _decoded(data_OB, tensor)[:, columns.start - first * block :]
    x_OI = x_OI[:, : columns.stop - columns.start]
    return x_OI if len(part) == 2 else x_OI[0]


def has_nan(tensor: GGUFTensor) -> bool:
    """Whether a value is NaN, or a block's scale is not a finite number."""
    if tensor.kind in FLOATS:
        return any_nan(lambda part: read_part(tensor, part), tensor.shape, dtype_of(tensor))
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    step = max(_PIECE * 4 // tensor.shape[-1], 1)
    _, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    for start in range(0, rows, step):
        data_OB = _read_rows(tensor, slice(start, min(start + step, rows)))
        for at in _SCALES_AT[tensor.kind]:
            scales = data_OB.reshape(-1, block_bytes)[:, at : at + 2].view(np.float16)
            if not np.isfinite(scales).all():
                return True
    return False


def to_q8_0(x_OI: np.ndarray) -> np.ndarray:
    """uint8 [O, B]: blocks of 32 values as a float16 scale and 32 int8."""
    return gguf.quants.quantize(np.ascontiguousarray(x_OI, np.float32), Kind.Q8_0)


def _read_rows(tensor: GGUFTensor, rows: slice) -> np.ndarray:
    count = tensor.shape[0] if len(tensor.shape) == 2 else 1
    row_bytes = tensor.nbytes // count
    # Read, not mapped: the pages of a map would count as this process's memory.
    size = (rows.stop - rows.start) * row_bytes
    data = np.fromfile(tensor.file, np.uint8, size, offset=tensor.offset + rows.start * row_bytes)
    if data.size != size:
        raise InterchangeError(f"{tensor.file}: {tensor.name}: truncated since it was opened")
    return data.reshape(-1, row_bytes)


def _decoded(data_OB: np.ndarray, tensor: GGUFTensor) -> np.ndarray:
    if tensor.kind in FLOATS:
        return data_OB.view(FLOATS[tensor.kind])
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    width = data_OB.shape[1] // block_bytes * block
    x_OI = np.empty((len(data_OB), width), np.float32)
    step = max(_PIECE // width, 1)
    for start in range(0, len(data_OB), step):
        piece_OB = np.ascontiguousarray(data_OB[start : start + step])
        x_OI[start : start + step] = gguf.quants.dequantize(piece_OB, tensor.kind)
    return x_OI
