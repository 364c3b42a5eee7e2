"""Which keys a query sees: its own segment, at or before its place in the row.

B batch, T queries, S keys. Segment 0 is padding: it sees nothing and nothing sees it.
"""

import jax
import jax.numpy as jnp


def visible(
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array,
    kv_order_S: jax.Array,
) -> jax.Array:
    """bool [B, T, S]: same segment, not padding, key not after query in the row's order."""
    same_BTS = q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]
    real_BT1 = (q_segment_ids_BT != 0)[:, :, None]
    causal_BTS = q_order_BT[:, :, None] >= kv_order_S[None, None, :]
    return same_BTS & real_BT1 & causal_BTS


def place_in_row(q_segment_ids_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: 0, 1, 2, ... along each row."""
    return jnp.broadcast_to(
        jnp.arange(q_segment_ids_BT.shape[1], dtype=jnp.int32), q_segment_ids_BT.shape
    )
