"""Attention on TPU: JAX's Pallas kernel (splash attention) under this project's masks.

Causal within segments, by each query's place in the row; grouped queries read their one key-value
head from HBM. Blocks that no query sees are skipped in both passes. Tokamax's form of the kernel
compiles to 3 % fewer instruction bundles and isn't worth its pins (docs/performance.md).
B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head dim,
I blocks of queries, J blocks of keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from llama_jax.kernels.blocks import Blocks, backward_plan, blocks_for

SAVED_NAME = "attention"  # of the output and the log-sum-exp, for remat policies


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array | None,
    device_kind: str,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> jax.Array:
    """The same function as `reference_attention`, on a TPU.

    Args:
      q_order_BT: place of each query among the keys of its row, ascending and the same in all
        rows; None for 0, 1, 2, ...
      device_kind: JAX's name of the chip, which chooses the block sizes.
      interpret: run the kernel's Python on any device, for tests.
      blocks: instead of the table's.
    """
    T, N, H = q_BTNH.shape[1:]
    S, K = k_BSKH.shape[1:3]
    blocks = blocks or blocks_for(device_kind, H, T, S)
    queries_bytes = q_BTNH.size // K * q_BTNH.dtype.itemsize
    blocks, at_once = backward_plan(device_kind, blocks, K, queries_bytes, S)
    to_q, to_kv = max(blocks.q, blocks.q_back), max(blocks.kv, blocks.kv_back)
    # The kernel doesn't scale; in float32, so that the rounding to q's dtype is the only one.
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q_BKGTH = (
        pad_to(q_BTNH, to_q).reshape(-1, round_up(T, to_q), K, N // K, H).transpose(0, 2, 3, 1, 4)
    )
    k_BKSH, v_BKSH = (pad_to(x, to_kv).transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    ids = kernel.SegmentIds(pad_to(q_segment_ids_BT, to_q), pad_to(kv_segment_ids_BS, to_kv))
    order_T = np.arange(T, dtype=np.int32) if q_order_BT is None else q_order_BT[0]
    attend = make_kernel(
        order_T, round_up(T, to_q), round_up(S, to_kv), blocks, interpret=interpret
    )
    out_BKGTH = _over_heads(attend, at_once, q_BKGTH, k_BKSH, v_BKSH, ids)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(-1, round_up(T, to_q), N, H)[:, :T]
    # To the kernel segment 0 is a segment like others: its queries see its keys, and only those.
    # Emptied here, what comes back through them is 0 as well.
    return jnp.where((q_segment_ids_BT != 0)[..., None, None], out_BTNH, 0)


def _over_heads(
    attend: kernel.SplashAttentionKernel,
    at_once: int,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    ids: kernel.SegmentIds,
) -> jax.Array:
    """The kernel over rows and key-value heads, `at_once` of these at a time."""
    # On chips whose device is two cores, dims that are mapped over are what the cores share out.
    over_heads = jax.vmap(jax.vmap(attend, in_axes=(0, 0, 0, None)))
    if at_once == k_BKSH.shape[1]:
        return over_heads(q_BKGTH, k_BKSH, v_BKSH, ids)  # pyright: ignore[reportReturnType]
    steps = k_BKSH.shape[1] // at_once

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], steps, at_once, *x.shape[2:]), 1, 0)

    arrays = tuple(split(x) for x in (q_BKGTH, k_BKSH, v_BKSH))
    out: jax.Array = jax.lax.map(lambda some: over_heads(*some, ids), arrays)  # pyright: ignore
    return jnp.moveaxis(out, 0, 1).reshape(q_BKGTH.shape)


def make_kernel(
    order_T: jax.Array | np.ndarray,
    T: int,
    S: int,
    blocks: Blocks,
    *,
    interpret: bool,
    save_residuals: bool = False,
) -> kernel.SplashAttentionKernel:
    """The kernel of one key-value head for T queries and S keys, both padded.

    Args:
      save_residuals: give the log-sum-exp as well, without a gradient rule.
    """
    sizes = kernel.BlockSizes(
        block_q=blocks.q,
        block_kv=blocks.kv,
        block_kv_compute=blocks.kv_compute,
        block_q_dkv=blocks.q_back,
        block_kv_dkv=blocks.kv_back,
        block_kv_dkv_compute=blocks.kv_back_compute,
        block_q_dq=None if blocks.fused else blocks.q_back,
        block_kv_dq=None if blocks.fused else blocks.kv_back,
        use_fused_bwd_kernel=blocks.fused,
    )
    xp = np if isinstance(order_T, np.ndarray) else jnp
    # What fills up the last block comes after everything: it keeps the order ascending.
    order_T = xp.concatenate([order_T, xp.full(T - order_T.shape[0], S - 1, np.int32)])
    forward = _seen_blocks(order_T, S, blocks.q, blocks.kv, over_queries=False)
    dkv = _seen_blocks(order_T, S, blocks.q_back, blocks.kv_back, over_queries=True)
    dq = _seen_blocks(order_T, S, blocks.q_back, blocks.kv_back, over_queries=False)
    return kernel.SplashAttentionKernel(
        forward,
        None if blocks.fused else dq,
        dkv,
        block_sizes=sizes,
        is_mqa=True,
        save_residuals=save_residuals,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=SAVED_NAME,
        mask_function=_not_after,
        interpret=interpret,
    )


def _seen_blocks(
    order_T: jax.Array | np.ndarray, S: int, q_block: int, kv_block: int, *, over_queries: bool
) -> MaskInfo:
    """Which pairs of blocks hold a visible key, and which block to fetch at each.

    The order ascends, so that a block's last query sees the most. At a pair that holds nothing the
    kernel names the next block that it will need, and the copy of that one goes on meanwhile.

    Args:
      over_queries: the kernel goes along the queries of a block of keys, not the other way round.
    """
    xp = np if isinstance(order_T, np.ndarray) else jnp
    last_I = order_T.reshape(-1, q_block)[:, -1]
    first_J = np.arange(S // kv_block, dtype=np.int32) * kv_block
    seen_IJ = last_I[:, None] >= first_J
    num_I, num_J = seen_IJ.shape
    if over_queries:
        # Those that see a block of keys are the last ones. Where none does nothing is fetched anew.
        from_J = xp.where(seen_IJ.any(0), seen_IJ.argmax(0), 0)
        fetched_IJ = xp.maximum(np.arange(num_I, dtype=np.int32)[:, None], from_J)
        fetched_IJ = xp.where(seen_IJ.any(0), fetched_IJ, 0)
    else:
        # After the last block that a query sees comes the next query, from key 0.
        fetched_IJ = xp.where(seen_IJ, np.arange(num_J, dtype=np.int32), 0)
    return MaskInfo(
        data_next=jnp.asarray(fetched_IJ[None], _smallest(max(num_I, num_J))),
        mask_next=None,
        block_mask=jnp.asarray(seen_IJ[None], jnp.int8),
        partial_mask_blocks=None,
        q_sequence=jnp.asarray(order_T),  # pyright: ignore[reportArgumentType]
    )


def _not_after(q_order: jax.Array, kv_order: jax.Array) -> jax.Array:
    return q_order >= kv_order


def _smallest(count: int) -> type[np.signedinteger]:
    # Scalar memory is small: 1 MiB on most chips.
    return np.int8 if count < 2**7 else np.int16 if count < 2**15 else np.int32


def round_up(length: int, block: int) -> int:
    """The least multiple of the block from `length` on."""
    return -(-length // block) * block


def pad_to(x: jax.Array, block: int) -> jax.Array:
    """Zeros added to dim 1 up to a multiple of the block: of segment 0 where they are ids."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))
