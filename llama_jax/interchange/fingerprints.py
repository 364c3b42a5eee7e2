"""What tells one checkpoint's model from another's."""

import hashlib
import json

from llama_jax.config.loading import to_table
from llama_jax.interchange.source import Source
from llama_jax.interchange.tensors import EMBEDDING, StoredTensor, head_rows

_ROWS = 8


def model_fingerprint(source: Source) -> str:
    """Sixteen hex digits of the architecture and of some rows of every kind of matrix.

    Any training of any of them changes it; two files of the same values in different dtypes differ.
    Of the first layer alone, so that a large model is not read whole.
    """
    digest = hashlib.sha256(json.dumps(to_table(source.config), sort_keys=True).encode())
    for name in sorted(source.tensors):
        if not name.startswith("layers.") or name.startswith("layers.0."):
            digest.update(name.encode())
            digest.update(_first_rows(source.tensors[name], source.config.head_dim))
    return digest.hexdigest()[:16]


def _first_rows(tensor: StoredTensor, head_dim: int) -> bytes:
    rows = head_dim if head_rows(tensor.name) else _ROWS
    if tensor.name == EMBEDDING or len(tensor.shape) == 1:
        rows = tensor.shape[0] if len(tensor.shape) == 1 else 256
    rows = min(rows, tensor.shape[0])
    part = (slice(0, rows), *(slice(0, size) for size in tensor.shape[1:]))
    return tensor.read(part).tobytes()
