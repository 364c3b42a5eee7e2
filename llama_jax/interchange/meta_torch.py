"""The one place where torch is imported, and tensors of its files become NumPy arrays.

Files are mapped, not read, and only by the loader that makes tensors and nothing else: a pickle
can hold any code. Pages of the map that were read count as this process's memory until the system
wants them back.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.interchange.tensors import BFLOAT16, InterchangeError


def import_torch() -> Any:
    """The module.

    Raises:
      InterchangeError: it isn't installed.
    """
    try:
        import torch
    except ImportError:
        raise InterchangeError(
            "Meta checkpoints need PyTorch, which isn't installed: pip install 'llama-jax[torch]'"
        ) from None
    return torch


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.pth` file by name, read-only and mapped from disk.

    Raises:
      InterchangeError: truncated or malformed, or it holds something other than tensors.
    """
    torch = import_torch()
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise InterchangeError(
            f"{path}: holds more than tensors; it is not read, as a pickle can run any code"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError):
        raise InterchangeError(
            f"{path}: truncated, or not a file of torch.save (of PyTorch 1.6 or later)"
        ) from None
    if not isinstance(state, dict):
        raise InterchangeError(f"{path}: holds a {type(state).__name__}, not tensors by name")
    return {name: _as_array(torch, path, name, value) for name, value in state.items()}


def _as_array(torch: Any, path: Path, name: Any, value: Any) -> np.ndarray:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise InterchangeError(f"{path}: {name}: a {type(value).__name__}, not a tensor")
    value = value.detach()
    if value.dtype == torch.bfloat16:
        array = value.view(torch.int16).numpy().view(BFLOAT16)
    elif value.dtype in (torch.float32, torch.float16):
        array = value.numpy()
    else:
        raise InterchangeError(f"{path}: {name}: {value.dtype} can't be read")
    array.flags.writeable = False
    return array
