"""Attention by backend name: the table of backends, and the layout that they run under.

B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
Backends see local arrays: heads split over the tensor axis, queries over context, and keys and
values gathered over context.
"""

from collections.abc import Callable
from typing import Literal

import jax

from llama_jax.kernels.blockwise import SHORT_BLOCK, blockwise_attention
from llama_jax.kernels.masks import place_in_row
from llama_jax.kernels.reference import reference_attention
from llama_jax.sharding.rules import axis_size, on_shards, shard_index

Backend = Callable[..., jax.Array]

# The TPU kernel (Pallas splash attention) goes here as "splash", and into `choose_backend`; the
# config's list of names grows with it.
BACKENDS: dict[str, Backend] = {
    "reference": reference_attention,
    "blockwise": blockwise_attention,
}
# A shorter row is less than two blocks: blocks would have nothing to skip. From here on the
# blockwise backend is faster (CPU, forward and backward) and keeps no T x S array.
BLOCKWISE_FROM = 2 * SHORT_BLOCK


def choose_backend(name: Literal["auto", "reference", "blockwise"], kv_len: int) -> str:
    """The backend that `auto` means for this many keys: `reference` below `BLOCKWISE_FROM`."""
    if name != "auto":
        return name
    return "blockwise" if kv_len >= BLOCKWISE_FROM else "reference"


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    backend: str,
) -> jax.Array:
    """Causal attention within segments: [B, T, N, H] in q's dtype.

    A query sees the keys of its own segment at or before its own place in the row; positions
    only turn the rotary embedding. Segment 0 is padding, whose output and gradients are 0.

    Args:
      k_BSKH: K divides N, and what the tensor axis holds divides K.
      backend: "auto" or a name in `BACKENDS`.
    """
    chosen = BACKENDS[choose_backend(backend, k_BSKH.shape[1])]  # type: ignore[arg-type]

    def local(
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        q_segment_ids_BT: jax.Array,
        kv_segment_ids_BS: jax.Array,
    ) -> jax.Array:
        # Split over context, this shard's queries start further down the row.
        order_BT = None
        if axis_size("length") > 1:
            first = shard_index("length") * q_BTNH.shape[1]
            order_BT = first + place_in_row(q_segment_ids_BT)
        return chosen(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            q_segment_ids_BT=q_segment_ids_BT,
            kv_segment_ids_BS=kv_segment_ids_BS,
            q_order_BT=order_BT,
        )

    queries = ("batch", "length", "q_heads", "head_dim")
    keys = ("batch", "key_length", "kv_heads", "head_dim")
    q_ids, kv_ids = ("batch", "length"), ("batch", "key_length")
    run = on_shards(local, (queries, keys, keys, q_ids, kv_ids), queries)
    return run(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT, kv_segment_ids_BS)
