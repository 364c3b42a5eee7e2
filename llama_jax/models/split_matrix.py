"""A weight cut into separate [out, in] matrices, for generating on a CPU.

XLA's CPU backend runs a product with a few rows on one core, and streams a matrix fastest along
its rows. Several products at once, one a core, use the machine's whole memory bandwidth.
M rows, C contracted, X output columns.
"""

import dataclasses
import itertools
import math
import os
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.sharding.rules import Dims, on_shards, sum_shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitMatrix:
    """Stands in for a parameter's array: `SplitMatrix[...]` is itself.

    Attributes:
      pieces: [X_i, C]; the X_i add up to X.
      out_shape: dims that X is reshaped to, such as (N, H).
    """

    pieces: tuple[jax.Array, ...]
    out_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: types.EllipsisType) -> "SplitMatrix":
        assert index is ..., "a split matrix is taken whole"
        return self

    def product(self, x: jax.Array, x_dims: Dims, out_dims: Dims) -> jax.Array:
        """float32 `x` times the matrix, by the logical dims of both; x's last ones are C."""
        rows = len(out_dims) - len(self.out_shape)

        def local(x: jax.Array, *pieces: jax.Array) -> jax.Array:
            x_MC = x.reshape(math.prod(x.shape[:rows]), -1)
            products = [
                jax.lax.dot_general(
                    x_MC, piece, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
                )
                for piece in pieces
            ]
            y_MX = jnp.concatenate(products, axis=1)
            # Sums over one shard: they only tell the type system that nothing is left to add.
            for dim in filter(None, x_dims[rows:]):
                y_MX = sum_shards(y_MX, dim)
            return y_MX.reshape(*x.shape[:rows], *self.out_shape)

        return on_shards(local, (x_dims, *self._dims()), out_dims)(x, *self.pieces)

    def rows(self, ids_BT: jax.Array, ids_dims: Dims, out_dims: Dims) -> jax.Array:
        """Rows of the whole by number: [B, T, C]."""

        def local(ids_BT: jax.Array, *pieces: jax.Array) -> jax.Array:
            found_BTC, start = jnp.zeros((), pieces[0].dtype), 0
            for piece in pieces:
                inside_BT = jnp.clip(ids_BT - start, 0, len(piece) - 1)
                found_BTC = jnp.where((ids_BT >= start)[..., None], piece[inside_BT], found_BTC)
                start += len(piece)
            return found_BTC

        return on_shards(local, (ids_dims, *self._dims()), out_dims)(ids_BT, *self.pieces)

    def _dims(self) -> list[Dims]:
        return [(None, None)] * len(self.pieces)


def split(w: np.ndarray, inputs: int, put: Callable[[np.ndarray], jax.Array]) -> SplitMatrix:
    """A parameter kept as [in..., out...], as many pieces as this process has cores.

    Args:
      w: its values.
      inputs: how many of its dims are inputs; 0 for an embedding, which is [out, in] already.
      put: makes an array of a piece.
    """
    if inputs == 0:
        w_XC, out_shape = w, w.shape[:1]
    else:
        out_shape = w.shape[inputs:]
        w_XC = w.reshape(math.prod(w.shape[:inputs]), -1).T
    X = w_XC.shape[0]
    count = min(_cores(), X)
    edges = [X * i // count for i in range(count + 1)]
    pieces = (np.ascontiguousarray(w_XC[a:b]) for a, b in itertools.pairwise(edges))
    return SplitMatrix(tuple(map(put, pieces)), tuple(out_shape))


def _cores() -> int:
    """Those that this process may use, where the system tells (macOS doesn't); else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
