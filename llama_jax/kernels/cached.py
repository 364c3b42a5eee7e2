"""Attention of new queries over a key-value cache: forward only, keys with heads first.

B batch, T queries, S places of the cache, C places a block, N query heads, K key-value heads,
G = N / K, H head dim. The queries stand in the T places from `first` on, the same for each row;
which places a row has filled is said by segment ids, 0 for holes.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.kernels.masks import visible
from llama_jax.kernels.reference import MASKED, masked_attention
from llama_jax.sharding.rules import Dims, on_shards, varying_like

# A cache of up to this many places is read whole. A longer one is read by blocks, and only as far
# as it is filled; the scores of T queries are held for one block at a time.
WHOLE_UP_TO, BLOCK = 1024, 512
CACHE: Dims = ("batch", "kv_heads", "key_length", "head_dim")


def cached_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    first: jax.Array,
) -> jax.Array:
    """Causal attention within segments, as `attention`: [B, T, N, H] in q's dtype.

    Args:
      k_BKSH: the cache, the new keys already in it; what the tensor axis holds divides K.
      first: int32 scalar, the place of the first query.
    """
    whole = k_BKSH.shape[2] <= WHOLE_UP_TO
    local = _whole if whole else functools.partial(_by_blocks, block=BLOCK)
    queries = ("batch", "length", "q_heads", "head_dim")
    in_dims = (queries, CACHE, CACHE, ("batch", "length"), ("batch", "key_length"), ())
    run = on_shards(local, in_dims, queries)
    return run(q_BTNH, k_BKSH, v_BKSH, q_segment_ids_BT, kv_segment_ids_BS, first)


def _whole(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_ids_BT: jax.Array,
    kv_ids_BS: jax.Array,
    first: jax.Array,
) -> jax.Array:
    order_BT = _order(q_ids_BT.shape, first)
    mask_BTS = visible(q_ids_BT, kv_ids_BS, order_BT, jnp.arange(k_BKSH.shape[2]))
    return masked_attention(q_BTNH, k_BKSH, v_BKSH, mask_BTS)


def _by_blocks(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_ids_BT: jax.Array,
    kv_ids_BS: jax.Array,
    first: jax.Array,
    *,
    block: int,
) -> jax.Array:
    """A running softmax (arXiv 2307.08691) over the blocks that hold a filled place."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    order_BT = _order((B, T), first)

    def add_block(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, sums = carry
        # The last block of a cache that blocks don't divide begins earlier; `fresh` leaves out
        # the places that the block before it had.
        start = jnp.minimum(number * block, S - block)
        k_BKCH, v_BKCH = (
            jax.lax.dynamic_slice_in_dim(x, start, block, 2) for x in (k_BKSH, v_BKSH)
        )
        kv_ids_BC = jax.lax.dynamic_slice_in_dim(kv_ids_BS, start, block, 1)
        places_C = start + jnp.arange(block, dtype=jnp.int32)
        fresh_C = places_C >= number * block
        mask_BTC = visible(q_ids_BT, kv_ids_BC, order_BT, places_C) & fresh_C
        mask = jnp.broadcast_to(mask_BTC[:, None, None], (B, 1, N // K, T, block))
        mask = mask.reshape(B, 1, -1, block)
        scores = jnp.einsum("BKMH,BKCH->BKMC", q_BKMH, k_BKCH, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores * H**-0.5, MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.where(mask, jnp.exp(scores - new_peak[..., None]), 0.0)
        shrink = jnp.exp(peak - new_peak)
        added = jnp.einsum(
            "BKMC,BKCH->BKMH",
            weights.astype(v_BKCH.dtype),
            v_BKCH,
            preferred_element_type=jnp.float32,
        )
        return new_peak, total * shrink + weights.sum(-1), sums * shrink[..., None] + added

    shape = q_BKMH.shape[:-1]
    start = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(q_BKMH.shape, jnp.float32),
    )
    start = tuple(varying_like(x, q_BTNH, k_BKSH) for x in start)
    _, total_BKM, sums_BKMH = jax.lax.fori_loop(
        0, (first + T + block - 1) // block, add_block, start
    )
    out_BKMH = sums_BKMH / jnp.where(total_BKM == 0.0, 1.0, total_BKM)[..., None]
    out_BTKGH = out_BKMH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def _order(shape: tuple[int, ...], first: jax.Array) -> jax.Array:
    return jnp.broadcast_to(first + jnp.arange(shape[1], dtype=jnp.int32), shape)
