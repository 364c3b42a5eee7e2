"""Casting stored values to the dtype that is written, with nothing lost unsaid."""

import numpy as np

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.interchange.tensors import DTYPES, InterchangeError, Slices, StoredTensor


def dtype_named(name: str) -> np.dtype:
    """The dtype that parameters are written in.

    Raises:
      ConfigError: none of that name.
    """
    if name not in DTYPES:
        raise ConfigError(f"unknown value '{name}'{nearest(name, list(DTYPES))}", key="dtype")
    return DTYPES[name]


def is_exact(stored: np.dtype, written: np.dtype) -> bool:
    """Whether every value keeps its value: the same dtype, or a 16-bit one widened."""
    return stored == written or (stored.itemsize == 2 and written.itemsize == 4)


def read_cast(tensor: StoredTensor, part: Slices, dtype: np.dtype) -> np.ndarray:
    """A part of a tensor in `dtype`, contiguous.

    Raises:
      InterchangeError: a finite value too large for float16.
    """
    values = tensor.read(part)
    if values.dtype == dtype:
        return np.ascontiguousarray(values)
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if dtype == np.float16 and np.isinf(cast).any() and np.isfinite(values[np.isinf(cast)]).any():
        raise InterchangeError(
            f"{tensor.file}: tensor {tensor.stored_name} holds values over float16's largest, "
            "65504; write bfloat16 or float32"
        )
    return np.ascontiguousarray(cast)
