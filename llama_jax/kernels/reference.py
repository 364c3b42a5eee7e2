"""Attention in the plainest form: all scores at once, softmax in float32.

B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head dim.
Memory is O(T * S) a head; `blockwise` is for long sequences.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.kernels.masks import place_in_row, visible

# Far below any real score, and finite, so that a row with nothing to see has no NaN anywhere.
MASKED = -1e30


def reference_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array | None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the visible keys; exactly 0 where there are none.

    Args:
      q_order_BT: place of each query among the keys of its row; None for 0, 1, 2, ... (T = S).
    """
    order_BT = place_in_row(q_segment_ids_BT) if q_order_BT is None else q_order_BT
    mask_BTS = visible(q_segment_ids_BT, kv_segment_ids_BS, order_BT, jnp.arange(k_BSKH.shape[1]))
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    # Each backend names what its own backward pass reads beside q, k and v, for remat policies.
    return checkpoint_name(masked_attention(q_BTNH, k_BKSH, v_BKSH, mask_BTS), "attention")


def masked_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """[B, T, N, H] in q's dtype over the keys that the mask shows; 0 where it shows none."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    # One batched matmul a key-value head, its G query heads stacked as rows: XLA's CPU backend
    # runs this several times faster than an einsum with a separate G dim, and nothing repeats k.
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    q_BKMH = q_BKGTH.reshape(B, K, -1, H)
    scores_BKMS = jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKMS.reshape(B, K, N // K, T, S) * H**-0.5
    mask_BKGTS = mask_BTS[:, None, None]
    scores_BKGTS = jnp.where(mask_BKGTS, scores_BKGTS, MASKED)
    peak_BKGT1 = jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True))
    # The second `where` empties rows that see nothing: there every score equals the peak.
    weights_BKGTS = jnp.where(mask_BKGTS, jnp.exp(scores_BKGTS - peak_BKGT1), 0.0)
    total_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
    sums_BKMH = jnp.einsum(
        "BKMS,BKSH->BKMH",
        weights_BKGTS.reshape(B, K, -1, S).astype(v_BKSH.dtype),
        v_BKSH,
        preferred_element_type=jnp.float32,
    )
    sums_BKGTH = sums_BKMH.reshape(B, K, N // K, T, H)
    out_BKGTH = sums_BKGTH / jnp.where(total_BKGT1 == 0.0, 1.0, total_BKGT1)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)
