"""Attention over blocks of queries and keys with a running softmax: memory O(T), any device.

FlashAttention-2 (arXiv 2307.08691) written as one scan over the pairs of blocks that can see each
other: the forward pass keeps a running maximum, sum and weighted values; the backward pass
recomputes each pair's weights from the saved log-sum-exp. Rows in order skip the pairs above the
diagonal, nearly half of the work.
B batch, T queries, S keys, A queries and C keys a block, N query heads, K key-value heads,
G = N / K, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.kernels.masks import place_in_row, visible
from llama_jax.kernels.reference import MASKED
from llama_jax.sharding.rules import varying_like

# Small blocks skip more above the diagonal and stay in a CPU's cache; long rows take larger ones,
# since the number of pairs grows with the square.
SHORT_BLOCK, LONG_BLOCK, LONG_FROM = 128, 512, 4096


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array | None,
    block: int | None = None,
) -> jax.Array:
    """The same function as `reference_attention`, for any T and S."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    block = block or (SHORT_BLOCK if S < LONG_FROM else LONG_BLOCK)
    in_order = q_order_BT is None
    order_BT = place_in_row(q_segment_ids_BT) if q_order_BT is None else q_order_BT
    order_BT = varying_like(order_BT, q_segment_ids_BT)
    # What fills up the last blocks is padding: segment 0, which sees nothing and isn't seen.
    q_BKGTH = _pad(q_BTNH, block).reshape(B, -1, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = (_pad(x, block).transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    # One type for all operands: the gradient rule below must return what it was given.
    k_BKSH, v_BKSH = (varying_like(x, q_BTNH) for x in (k_BKSH, v_BKSH))
    rows = (_pad(x, block) for x in (q_segment_ids_BT, kv_segment_ids_BS, order_BT))
    out_BKGTH: jax.Array = _flash(block, in_order, q_BKGTH, k_BKSH, v_BKSH, *rows)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(block: int, in_order: bool, *arrays: jax.Array) -> jax.Array:
    return _forward(block, in_order, *arrays)[0]


def _forward(
    block: int,
    in_order: bool,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_ids_BT: jax.Array,
    kv_ids_BS: jax.Array,
    order_BT: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def add_pair(
        carry: tuple[jax.Array, ...], pair: jax.Array
    ) -> tuple[tuple[jax.Array, ...], None]:
        i, j = pair[0], pair[1]
        peak, total, sums = (_slice(x, i, block, 3) for x in carry)
        k_BKCH, v_BKCH = (_slice(x, j, block, 2) for x in (k_BKSH, v_BKSH))
        mask = _mask(pair, block, q_ids_BT, kv_ids_BS, order_BT)
        scores = jnp.where(mask, _scores(_slice(q_BKGTH, i, block, 3), k_BKCH), MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.where(mask, jnp.exp(scores - new_peak[..., None]), 0.0)
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + weights.sum(-1)
        added = _rows("BKMC,BKCH->BKMH", weights.astype(v_BKCH.dtype), v_BKCH)
        sums = sums * shrink[..., None] + added
        new = (new_peak, total, sums)
        return tuple(_put(x, y, i, block) for x, y in zip(carry, new, strict=True)), None

    shape = q_BKGTH.shape[:-1]
    start = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(q_BKGTH.shape, jnp.float32),
    )
    start = tuple(varying_like(x, q_BKGTH) for x in start)
    pairs = _pairs(q_BKGTH.shape[3] // block, k_BKSH.shape[2] // block, in_order)
    (peak_BKGT, total_BKGT, sums_BKGTH), _ = jax.lax.scan(add_pair, start, pairs)
    safe_BKGT = jnp.where(total_BKGT == 0.0, 1.0, total_BKGT)
    out_BKGTH = (sums_BKGTH / safe_BKGT[..., None]).astype(q_BKGTH.dtype)
    log_total_BKGT = peak_BKGT + jnp.log(safe_BKGT)
    # Named, so that a remat policy which keeps attention keeps all that its backward pass needs.
    out_BKGTH = checkpoint_name(out_BKGTH, "attention")
    log_total_BKGT = checkpoint_name(log_total_BKGT, "attention")
    saved = (q_BKGTH, k_BKSH, v_BKSH, q_ids_BT, kv_ids_BS, order_BT)
    return out_BKGTH, (*saved, out_BKGTH, log_total_BKGT)


def _backward(
    block: int, in_order: bool, saved: tuple[jax.Array, ...], grad_BKGTH: jax.Array
) -> tuple[jax.Array | None, ...]:
    q_BKGTH, k_BKSH, v_BKSH, q_ids_BT, kv_ids_BS, order_BT, out_BKGTH, log_total_BKGT = saved
    # Row sums of grad * out: what the softmax's normalisation takes back (paper, section 2.2).
    taken_BKGT = (grad_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1)

    def add_pair(
        carry: tuple[jax.Array, ...], pair: jax.Array
    ) -> tuple[tuple[jax.Array, ...], None]:
        i, j = pair[0], pair[1]
        q, grad, log_total, taken = (
            _slice(x, i, block, 3) for x in (q_BKGTH, grad_BKGTH, log_total_BKGT, taken_BKGT)
        )
        k_BKCH, v_BKCH = (_slice(x, j, block, 2) for x in (k_BKSH, v_BKSH))
        mask = _mask(pair, block, q_ids_BT, kv_ids_BS, order_BT)
        scores = jnp.where(mask, _scores(q, k_BKCH), MASKED)
        weights = jnp.where(mask, jnp.exp(scores - log_total[..., None]), 0.0)
        grad_weights = _rows("BKMH,BKCH->BKMC", grad, v_BKCH)
        grad_scores = weights * (grad_weights - taken[..., None])
        grad_scores = (grad_scores * q.shape[-1] ** -0.5).astype(q.dtype)
        grad_q, grad_k, grad_v = carry
        grad_q = _add(grad_q, _rows("BKMC,BKCH->BKMH", grad_scores, k_BKCH), i, block, 3)
        grad_k = _add(grad_k, _columns(grad_scores, q), j, block, 2)
        grad_v = _add(grad_v, _columns(weights.astype(grad.dtype), grad), j, block, 2)
        return (grad_q, grad_k, grad_v), None

    start = tuple(
        varying_like(jnp.zeros(x.shape, jnp.float32), q_BKGTH) for x in (q_BKGTH, k_BKSH, v_BKSH)
    )
    pairs = _pairs(q_BKGTH.shape[3] // block, k_BKSH.shape[2] // block, in_order)
    grads, _ = jax.lax.scan(add_pair, start, pairs)
    typed = (g.astype(x.dtype) for g, x in zip(grads, (q_BKGTH, k_BKSH, v_BKSH), strict=True))
    return (*typed, None, None, None)


_flash.defvjp(_forward, _backward)


def _pairs(queries: int, keys: int, in_order: bool) -> jax.Array:
    """int32 [P, 2]: block numbers (query, key); in order, a key block after the query's is out."""
    pairs = [(i, j) for i in range(queries) for j in range(keys) if j <= i or not in_order]
    return jnp.array(pairs, jnp.int32)


def _pad(x: jax.Array, block: int) -> jax.Array:
    """Zeros added to dim 1 up to a multiple of the block."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def _put(x: jax.Array, part: jax.Array, index: jax.Array, block: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, index * block, 3)


def _add(x: jax.Array, part: jax.Array, index: jax.Array, block: int, axis: int) -> jax.Array:
    total = _slice(x, index, block, axis) + part
    return jax.lax.dynamic_update_slice_in_dim(x, total, index * block, axis)


def _slice(x: jax.Array, index: jax.Array, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _mask(
    pair: jax.Array, block: int, q_ids_BT: jax.Array, kv_ids_BS: jax.Array, order_BT: jax.Array
) -> jax.Array:
    """bool [B, 1, 1, A, C]."""
    kv_order_C = pair[1] * block + jnp.arange(block, dtype=jnp.int32)
    q_ids_BA, order_BA = (_slice(x, pair[0], block, 1) for x in (q_ids_BT, order_BT))
    kv_ids_BC = _slice(kv_ids_BS, pair[1], block, 1)
    return visible(q_ids_BA, kv_ids_BC, order_BA, kv_order_C)[:, None, None]


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
