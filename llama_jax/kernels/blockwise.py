"""Attention over blocks of keys with a running softmax: memory O(T * block), any device.

FlashAttention-2 (arXiv 2307.08691) written as a scan: the forward pass keeps a running maximum,
sum and weighted values; the backward pass recomputes each block's weights from the saved
log-sum-exp. B batch, T queries, S keys, C keys a block, N query heads, K key-value heads,
G = N / K, M = G * T rows, H head dim.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.kernels.masks import visible
from llama_jax.kernels.reference import MASKED
from llama_jax.sharding.rules import varying_like

# Keys a block. Large enough that the matmuls stay efficient, small enough for 128K queries.
BLOCK = 512


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array,
    block: int = BLOCK,
) -> jax.Array:
    """The same function as `reference_attention`, for any T and S."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    block = min(block, S)
    # Padding keys get segment 0, which nothing sees.
    spare = -S % block
    k_BKSH, v_BKSH = (
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, spare), (0, 0)))
        for x in (k_BSKH, v_BSKH)
    )
    segments_BS = jnp.pad(kv_segment_ids_BS, ((0, 0), (0, spare)))
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    # One type for all operands: the gradient rule below must return what it was given.
    k_BKSH, v_BKSH = (varying_like(x, q_BTNH) for x in (k_BKSH, v_BKSH))
    out_BKGTH = _flash(block, q_BKGTH, k_BKSH, v_BKSH, q_segment_ids_BT, segments_BS, q_order_BT)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    block: int,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array,
) -> jax.Array:
    return _forward(
        block, q_BKGTH, k_BKSH, v_BKSH, q_segment_ids_BT, kv_segment_ids_BS, q_order_BT
    )[0]


def _forward(
    block: int,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def add_block(
        carry: tuple[jax.Array, ...], index: jax.Array
    ) -> tuple[tuple[jax.Array, ...], None]:
        peak_BKGT, total_BKGT, sums_BKGTH = carry
        k_BKCH, v_BKCH = (_slice(x, index, block, 2) for x in (k_BKSH, v_BKSH))
        mask = _mask(index, block, q_segment_ids_BT, kv_segment_ids_BS, q_order_BT)
        scores = jnp.where(mask, _scores(q_BKGTH, k_BKCH), MASKED)
        new_peak_BKGT = jnp.maximum(peak_BKGT, scores.max(-1))
        weights = jnp.where(mask, jnp.exp(scores - new_peak_BKGT[..., None]), 0.0)
        shrink_BKGT = jnp.exp(peak_BKGT - new_peak_BKGT)
        total_BKGT = total_BKGT * shrink_BKGT + weights.sum(-1)
        sums_BKGTH = sums_BKGTH * shrink_BKGT[..., None] + _rows(
            "BKMC,BKCH->BKMH", weights.astype(v_BKCH.dtype), v_BKCH
        )
        return (new_peak_BKGT, total_BKGT, sums_BKGTH), None

    shape = q_BKGTH.shape[:-1]
    start = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(q_BKGTH.shape, jnp.float32),
    )
    start = jax.tree.map(lambda x: varying_like(x, q_BKGTH), start)
    blocks = jnp.arange(k_BKSH.shape[2] // block)
    (peak_BKGT, total_BKGT, sums_BKGTH), _ = jax.lax.scan(add_block, start, blocks)
    safe_BKGT = jnp.where(total_BKGT == 0.0, 1.0, total_BKGT)
    out_BKGTH = (sums_BKGTH / safe_BKGT[..., None]).astype(q_BKGTH.dtype)
    log_total_BKGT = peak_BKGT + jnp.log(safe_BKGT)
    saved = (q_BKGTH, k_BKSH, v_BKSH, q_segment_ids_BT, kv_segment_ids_BS, q_order_BT)
    return out_BKGTH, (*saved, out_BKGTH, log_total_BKGT)


def _backward(
    block: int, saved: tuple[jax.Array, ...], grad_BKGTH: jax.Array
) -> tuple[jax.Array | None, ...]:
    q_BKGTH, k_BKSH, v_BKSH, q_ids_BT, kv_ids_BS, q_order_BT, out_BKGTH, log_total_BKGT = saved
    # Row sums of grad * out: what the softmax's normalisation takes back (paper, section 2.2).
    taken_BKGT = (grad_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1)

    def add_block(
        grad_q_BKGTH: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k_BKCH, v_BKCH = (_slice(x, index, block, 2) for x in (k_BKSH, v_BKSH))
        mask = _mask(index, block, q_ids_BT, kv_ids_BS, q_order_BT)
        scores = jnp.where(mask, _scores(q_BKGTH, k_BKCH), MASKED)
        weights = jnp.where(mask, jnp.exp(scores - log_total_BKGT[..., None]), 0.0)
        grad_v_BKCH = _columns(weights.astype(grad_BKGTH.dtype), grad_BKGTH)
        grad_weights = _rows("BKMH,BKCH->BKMC", grad_BKGTH, v_BKCH)
        grad_scores = weights * (grad_weights - taken_BKGT[..., None])
        grad_scores = (grad_scores * q_BKGTH.shape[-1] ** -0.5).astype(q_BKGTH.dtype)
        grad_q_BKGTH = grad_q_BKGTH + _rows("BKMC,BKCH->BKMH", grad_scores, k_BKCH)
        grad_k_BKCH = _columns(grad_scores, q_BKGTH)
        return grad_q_BKGTH, (grad_k_BKCH.astype(k_BKSH.dtype), grad_v_BKCH.astype(v_BKSH.dtype))

    start = varying_like(jnp.zeros(q_BKGTH.shape, jnp.float32), q_BKGTH)
    blocks = jnp.arange(k_BKSH.shape[2] // block)
    grad_q_BKGTH, grads = jax.lax.scan(add_block, start, blocks)
    grad_k_BKSH, grad_v_BKSH = (jnp.moveaxis(x, 0, 2).reshape(k_BKSH.shape) for x in grads)
    return grad_q_BKGTH.astype(q_BKGTH.dtype), grad_k_BKSH, grad_v_BKSH, None, None, None


_flash.defvjp(_forward, _backward)


def _slice(x: jax.Array, index: jax.Array, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _mask(
    index: jax.Array,
    block: int,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array,
) -> jax.Array:
    kv_order_C = index * block + jnp.arange(block, dtype=jnp.int32)
    ids_BC = _slice(kv_segment_ids_BS, index, block, 1)
    return visible(q_segment_ids_BT, ids_BC, q_order_BT, kv_order_C)[:, None, None]


def _scores(q_BKGTH: jax.Array, k_BKCH: jax.Array) -> jax.Array:
    return _rows("BKMH,BKCH->BKMC", q_BKGTH, k_BKCH) * q_BKGTH.shape[-1] ** -0.5


def _rows(spec: str, left_BKGTX: jax.Array, right: jax.Array) -> jax.Array:
    """A batched matmul with the G query heads stacked as rows; float32 out. [B, K, G, T, ...]"""
    B, K, G, T, X = left_BKGTX.shape
    left_BKMX = left_BKGTX.reshape(B, K, G * T, X)
    out = jnp.einsum(spec, left_BKMX, right, preferred_element_type=jnp.float32)
    return out.reshape(B, K, G, T, -1)


def _columns(left_BKGTC: jax.Array, right_BKGTH: jax.Array) -> jax.Array:
    """Summed over the G * T rows of both: float32 [B, K, C, H]."""
    left, right = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (left_BKGTC, right_BKGTH))
    return jnp.einsum("BKMC,BKMH->BKCH", left, right, preferred_element_type=jnp.float32)
