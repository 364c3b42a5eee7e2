"""Write a folder in Meta's layout, as one rank's checkpoint.

`torch.load` reads it as any other, but it is written piece by piece: peak memory is a piece of
`PIECE_BYTES` and its cast, whatever the model.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llama_jax.interchange.casting import dtype_named, read_cast
from llama_jax.interchange.checking import check_structure
from llama_jax.interchange.hugging_face_writing import write_side_files
from llama_jax.interchange.json_files import write_json
from llama_jax.interchange.meta import PARAMS_FILE
from llama_jax.interchange.meta_archive import Archive
from llama_jax.interchange.meta_names import to_meta
from llama_jax.interchange.meta_params import params_from_config
from llama_jax.interchange.meta_rows import to_neighbour_pairs
from llama_jax.interchange.source import Source
from llama_jax.interchange.tensors import StoredTensor, canonical_shapes, head_rows, pieces
from llama_jax.tokenizers import Tokenizer

WEIGHTS_FILE = "consolidated.00.pth"


def write_meta(
    source: Source,
    folder: Path,
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """`params.json`, `consolidated.00.pth` and the tokenizer's files into `folder`.

    A tied model gets no head tensor, as Meta's. Beside them, for `open_meta` and unknown to Meta's
    code: the generation config and the chat template.

    Args:
      source: of any format.
      folder: is made where needed.
      dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's own.
      tokenizer: is written beside where given.

    Raises:
      InterchangeError: a field that Meta's layout can't express, a tensor at fault, a value too
        large for float16; PyTorch isn't installed.
    """
    params = params_from_config(source.config)
    check_structure(source)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PARAMS_FILE, params)
    write_side_files(source, folder, tokenizer)
    tensors = [source.tensors[name] for name in canonical_shapes(source.config)]
    dtypes = [each.dtype if dtype is None else dtype_named(dtype) for each in tensors]
    pairs = list(zip(tensors, dtypes, strict=True))
    layout = {to_meta(each.name): (each.shape, written) for each, written in pairs}
    with Archive(folder / WEIGHTS_FILE, layout) as archive:
        for tensor, written in pairs:
            archive.add(_pieces(tensor, written, source.config.head_dim))


def _pieces(tensor: StoredTensor, dtype: np.dtype, head_dim: int) -> Iterator[np.ndarray]:
    by_heads = head_rows(tensor.name)
    for part in pieces(tensor.shape, 4, multiple=head_dim if by_heads else 1):
        values = read_cast(tensor, part, dtype)
        yield to_neighbour_pairs(values, head_dim) if by_heads else values
