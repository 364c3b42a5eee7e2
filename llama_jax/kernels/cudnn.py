"""Attention on NVIDIA GPUs by cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

The kernel knows no segments. They reach it as a bias of T x S a row, in the operands' dtype, which
XLA makes from the segment ids at each call; grouped queries read their one key-value head.
B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.kernels.masks import place_in_row, visible

DTYPES = ("bfloat16", "float16")
LARGEST_HEAD_DIM = 128  # 256 from Hopper on; no Llama asks for more than 128


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array | None,
) -> jax.Array:
    """The same function as `reference_attention`, on an NVIDIA GPU."""
    in_order = q_order_BT is None
    order_BT = place_in_row(q_segment_ids_BT) if q_order_BT is None else q_order_BT
    order_S = jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)
    mask_BTS = visible(q_segment_ids_BT, kv_segment_ids_BS, order_BT, order_S)
    # Rows in order let the kernel skip what is above the diagonal; the mask says it again.
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], is_causal=in_order, implementation="cudnn"
    )
    # A query that sees nothing gets a mean of values; emptied, nothing comes back through it.
    out_BTNH = jnp.where((q_segment_ids_BT != 0)[..., None, None], out_BTNH, 0)
    # Only the output has a name: the kernel's own log-sum-exp is out of reach, so that a remat
    # policy which keeps attention still runs the kernel forward again.
    return checkpoint_name(out_BTNH, "attention")


def unsupported(dtype: str, head_dim: int, q_len: int, kv_len: int) -> str | None:
    """Why cuDNN's kernel can't take these; None where it can."""
    if dtype not in DTYPES:
        return f"its operands are {' or '.join(DTYPES)}, not {dtype}"
    if head_dim % 8 or head_dim > LARGEST_HEAD_DIM:
        return f"head dim {head_dim} is no multiple of 8 up to {LARGEST_HEAD_DIM}"
    if q_len % 2 or kv_len % 2:
        return f"a length of {q_len if q_len % 2 else kv_len} is odd"
    return None


def bias_bytes(rows: int, q_len: int, kv_len: int, itemsize: int) -> int:
    """What the bias that holds the segments takes in one call."""
    return rows * q_len * kv_len * itemsize
