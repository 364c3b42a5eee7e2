"""The order of a row that is split over the context axis, so that a causal mask gives equal work.

A row is cut into 2c chunks for c shards; shard i holds chunks i and 2c - 1 - i (the Llama 3 paper,
arXiv 2407.21783, section 3.3.2). Early queries see few keys and late ones many: each pair of an
early and a late chunk sees as many as any other.

    c = 2, row 0 1 2 3 4 5 6 7  ->  0 1 6 7 | 2 3 4 5

Without a context axis everything here leaves its argument alone.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.loading import ConfigError
from llama_jax.sharding.rules import Dims, axis_size, lay_out, on_shards, shard_index

Tree = TypeVar("Tree")
_WHOLE: Dims = ("batch", "key_length")


def zigzag_places(length: int, ways: int) -> np.ndarray:
    """int32 [length]: which place of the row each place of the zigzag order holds.

    Raises:
      ConfigError: the row doesn't cut into two equal chunks a shard.
    """
    if length % (2 * ways):
        raise ConfigError(
            f"a row of {length} tokens doesn't cut into the {2 * ways} chunks (two a shard) that "
            f"a context axis of {ways} asks for; a multiple of {2 * ways} fits",
            key="mesh.context",
        )
    chunks = np.arange(length, dtype=np.int32).reshape(2 * ways, -1)
    return np.stack([chunks[:ways], chunks[: ways - 1 : -1]], axis=1).reshape(-1)


def to_zigzag(rows: Tree) -> Tree:
    """A tree of [B, T, ...] arrays in natural order, such as a batch, in that of `Llama.hidden`."""
    ways = axis_size("length")
    if ways == 1:
        return rows

    def permute(x_BT: jax.Array) -> jax.Array:
        zigzag_places(x_BT.shape[1], ways)  # for its error

        def local(x_BS: jax.Array) -> jax.Array:
            return jnp.take(x_BS, local_places(x_BS.shape[1] // ways), axis=1)

        rest = (None,) * (x_BT.ndim - 2)
        return on_shards(local, ((*_WHOLE, *rest),), ("batch", "length", *rest))(x_BT)

    return jax.tree.map(permute, rows)


def from_zigzag(x_BTD: jax.Array, dims: Dims) -> jax.Array:
    """A [B, T, ...] array in the order of `Llama.hidden`, in natural order. Gathers it meanwhile.

    Args:
      dims: logical dims of `x_BTD`, of which the second is "length".
    """
    if axis_size("length") == 1:
        return x_BTD
    whole = lay_out(x_BTD, (dims[0], "key_length", *dims[2:]))
    return lay_out(in_natural_order(whole, axis_size("length")), dims)


def local_places(length: int) -> jax.Array:
    """Inside `on_shards`: int32 [length], the places in their row of this shard's tokens."""
    ways, shard = axis_size("length"), shard_index("length")
    half = jnp.arange(length // 2, dtype=jnp.int32)
    late = 2 * ways - 1 - shard
    return jnp.concatenate([half + shard * (length // 2), half + late * (length // 2)])


def in_natural_order(x_BSH: jax.Array, ways: int) -> jax.Array:
    """[B, S, ...] gathered from `ways` shards, which hold it in zigzag order."""
    if ways == 1:
        return x_BSH
    B, S, *rest = x_BSH.shape
    pairs = x_BSH.reshape(B, ways, 2, S // (2 * ways), *rest)
    # The early chunks ascend and the late ones descend.
    natural = jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1)
    return natural.reshape(x_BSH.shape)
