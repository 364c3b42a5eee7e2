"""Looking tokens up in an embedding that is split over the mesh. B batch, T length, D width,
V vocabulary."""

import jax
import jax.numpy as jnp

from llama_jax.sharding.rules import (
    Dims,
    at_use,
    axis_size,
    exchange_shards,
    gather_shards,
    on_shards,
    shard_index,
    sum_shards,
)

TOKENS: Dims = ("batch", "length")
ACT: Dims = ("batch", "length", "embed")
# A TPU moves rows in registers of this many columns: narrower ones cost as much.
LANES = 128


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
    """Rows of the table: [B, T, D] in `dtype`, laid out as an activation before a product.

    While fsdp leaves each device whole registers of columns, the table stays where it is stored:
    every device looks up its columns for all tokens of its fsdp group, and these are exchanged for
    all columns of its own. Both passes so move the tokens' own bytes, not the table's, and the
    gradient is summed where it is kept, in the parameter's dtype.
    """
    ways = axis_size("stored_embed")
    if ways == 1 or table_VD.shape[1] // ways >= LANES:
        run = on_shards(_columns, (("vocab", "stored_embed"), TOKENS), ACT)
        return run(table_VD, tokens_BT).astype(dtype)
    table: Dims = ("vocab", "embed")
    return on_shards(_rows, (table, TOKENS), ACT)(at_use(table_VD.astype(dtype), table), tokens_BT)


def _columns(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    x_BTD = _rows(table_VD, gather_shards(tokens_BT, "stored_embed", 0))
    return exchange_shards(x_BTD, "stored_embed", split_axis=0, concat_axis=2)


def _rows(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    # Each shard of the vocabulary looks up the ids that it holds; the sum is the row.
    index_BT = tokens_BT - shard_index("vocab") * table_VD.shape[0]
    held_BT = (index_BT >= 0) & (index_BT < table_VD.shape[0])
    x_BTD = table_VD[jnp.where(held_BT, index_BT, 0)]
    return sum_shards(jnp.where(held_BT[..., None], x_BTD, 0), "vocab")
