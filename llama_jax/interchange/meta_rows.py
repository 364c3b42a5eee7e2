"""Row order of q and k, the one difference between layouts that no shape shows.

Meta's files and GGUF's rotate neighbouring pairs of a head's rows (2i, 2i + 1); Hugging Face and
this package rotate the two halves (i, i + H/2). H head dim; X columns, or none of a bias.
"""

import numpy as np

from llama_jax.interchange.tensors import InterchangeError


def to_half_split(x_NHX: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of whole heads from Meta's order: of a head of 8, rows 0 2 4 6 1 3 5 7."""
    return _transposed(x_NHX, (head_dim // 2, 2))


def to_neighbour_pairs(x_NHX: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse: of a head of 8, rows 0 4 1 5 2 6 3 7."""
    return _transposed(x_NHX, (2, head_dim // 2))


def check_whole_heads(rows: slice, head_dim: int, name: str) -> None:
    """Raise `InterchangeError` where a slice of rows cuts a head; its rows change places."""
    if rows.start % head_dim or rows.stop % head_dim:
        raise InterchangeError(
            f"{name}: rows {rows.start} to {rows.stop} cut a head of {head_dim} rows"
        )


def _transposed(x_NHX: np.ndarray, pairs: tuple[int, int]) -> np.ndarray:
    by_pair = x_NHX.reshape(-1, *pairs, *x_NHX.shape[1:])
    return by_pair.swapaxes(1, 2).reshape(x_NHX.shape)
