"""Attention over blocks of queries and keys with a running softmax: memory O(T), any device.

FlashAttention-2 (arXiv 2307.08691) written as one scan over the pairs of blocks that can see each
other: the forward pass keeps a running maximum, sum and weighted values; the backward pass
recomputes each pair's weights from the saved log-sum-exp. Rows in order skip the pairs above the
diagonal, nearly half of the work, and all rows the pairs that no segment has a part of both of.
B batch, T queries, S keys, A queries and C keys a block, N query heads, K key-value heads,
G = N / K, H head dim.
"""

import functools
from collections.abc import Callable

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
    T, K = q_BTNH.shape[1], k_BSKH.shape[2]
    block = block or _block(k_BSKH.shape[1])
    rows = _rows_of(block, q_segment_ids_BT, kv_segment_ids_BS, q_order_BT)
    # One type for all operands: the gradient rule below must return what it was given.
    q_BKGTH = _queries(q_BTNH, K, block)
    k_BKSH, v_BKSH = (varying_like(_keys(x, block), q_BTNH) for x in (k_BSKH, v_BSKH))
    out_BKGTH: jax.Array = _flash(block, q_order_BT is None, q_BKGTH, k_BKSH, v_BKSH, *rows)
    return _from_queries(out_BKGTH, T)


def partial_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attention over a part of the keys, without a gradient rule, and what merging parts needs.

    Returns:
      float32 [B, T, N, H], and float32 [B, T, N] log-sum-exp of the scores; 0 and `MASKED` for a
      query that sees none of these keys.
    """
    T, K = q_BTNH.shape[1], k_BSKH.shape[2]
    block = _block(k_BSKH.shape[1])
    rows = _rows_of(block, q_segment_ids_BT, kv_segment_ids_BS, q_order_BT)
    q_BKGTH = _queries(q_BTNH, K, block)
    k_BKSH, v_BKSH = _keys(k_BSKH, block), _keys(v_BSKH, block)
    out_BKGTH, log_total_BKGT = _sums(block, False, q_BKGTH, k_BKSH, v_BKSH, *rows)
    return _from_queries(out_BKGTH, T), _from_queries(log_total_BKGT[..., None], T)[..., 0]


def partial_attention_gradients(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    out_BTNH: jax.Array,
    log_total_BTN: jax.Array,
    grad_BTNH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a part of the keys adds to the gradients of q, and the gradients of that part.

    Args:
      out_BTNH, log_total_BTN: of all parts, merged.
      grad_BTNH: of the merged output.

    Returns:
      float32, shaped as q, k and v.
    """
    T, S, K = q_BTNH.shape[1], k_BSKH.shape[1], k_BSKH.shape[2]
    block = _block(S)
    rows = _rows_of(block, q_segment_ids_BT, kv_segment_ids_BS, q_order_BT)
    q_BKGTH, grad_BKGTH, out_BKGTH = (_queries(x, K, block) for x in (q_BTNH, grad_BTNH, out_BTNH))
    log_total_BKGT = _queries(log_total_BTN[..., None], K, block)[..., 0]
    k_BKSH, v_BKSH = _keys(k_BSKH, block), _keys(v_BSKH, block)
    saved = (q_BKGTH, k_BKSH, v_BKSH, *rows, out_BKGTH, log_total_BKGT)
    q_grad, k_grad, v_grad = _gradients(block, False, saved, grad_BKGTH)
    k_grad, v_grad = (x.transpose(0, 2, 1, 3)[:, :S] for x in (k_grad, v_grad))
    return _from_queries(q_grad, T), k_grad, v_grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(block: int, in_order: bool, *arrays: jax.Array) -> jax.Array:
    return _forward(block, in_order, *arrays)[0]


def _forward(
    block: int, in_order: bool, *arrays: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out_BKGTH, log_total_BKGT = _sums(block, in_order, *arrays)
    # Named, so that a remat policy which keeps attention keeps all that its backward pass needs.
    out_BKGTH = checkpoint_name(out_BKGTH.astype(arrays[0].dtype), "attention")
    log_total_BKGT = checkpoint_name(log_total_BKGT, "attention")
    return out_BKGTH, (*arrays, out_BKGTH, log_total_BKGT)


def _backward(
    block: int, in_order: bool, saved: tuple[jax.Array, ...], grad_BKGTH: jax.Array
) -> tuple[jax.Array | None, ...]:
    grads = _gradients(block, in_order, saved, grad_BKGTH)
    typed = (g.astype(x.dtype) for g, x in zip(grads, saved[:3], strict=True))
    return (*typed, None, None, None)


_flash.defvjp(_forward, _backward)


def _sums(
    block: int,
    in_order: bool,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_ids_BT: jax.Array,
    kv_ids_BS: jax.Array,
    order_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp, float32."""

    def add_pair(carry: tuple[jax.Array, ...], pair: jax.Array) -> tuple[jax.Array, ...]:
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
        return tuple(_put(x, y, i, block) for x, y in zip(carry, new, strict=True))

    shape = q_BKGTH.shape[:-1]
    start = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(q_BKGTH.shape, jnp.float32),
    )
    start = tuple(varying_like(x, q_BKGTH) for x in start)
    peak_BKGT, total_BKGT, sums_BKGTH = _over_pairs(
        add_pair, start, block, in_order, (q_ids_BT, kv_ids_BS, order_BT)
    )
    safe_BKGT = jnp.where(total_BKGT == 0.0, 1.0, total_BKGT)
    return sums_BKGTH / safe_BKGT[..., None], peak_BKGT + jnp.log(safe_BKGT)


def _gradients(
    block: int, in_order: bool, saved: tuple[jax.Array, ...], grad_BKGTH: jax.Array
) -> tuple[jax.Array, ...]:
    """float32 gradients of q, k and v."""
    q_BKGTH, k_BKSH, v_BKSH, q_ids_BT, kv_ids_BS, order_BT, out_BKGTH, log_total_BKGT = saved
    # Row sums of grad * out: what the softmax's normalisation takes back (paper, section 2.2).
    taken_BKGT = (grad_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1)

    def add_pair(carry: tuple[jax.Array, ...], pair: jax.Array) -> tuple[jax.Array, ...]:
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
        return grad_q, grad_k, grad_v

    start = tuple(
        varying_like(jnp.zeros(x.shape, jnp.float32), q_BKGTH) for x in (q_BKGTH, k_BKSH, v_BKSH)
    )
    return _over_pairs(add_pair, start, block, in_order, (q_ids_BT, kv_ids_BS, order_BT))


def _over_pairs(
    add_pair: Callable[[tuple[jax.Array, ...], jax.Array], tuple[jax.Array, ...]],
    start: tuple[jax.Array, ...],
    block: int,
    in_order: bool,
    rows: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """`add_pair` over the pairs of blocks that may see each other."""
    q_ids_BT, kv_ids_BS, order_BT = rows
    q_spans, kv_spans = _spans(q_ids_BT, block), _spans(kv_ids_BS, block)

    def step(carry: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        # Which segments are in a block is known at run time only: so is what it sees.
        (q_first_B, q_last_B), (kv_first_B, kv_last_B) = q_spans[pair[0]], kv_spans[pair[1]]
        seen = ((q_first_B <= kv_last_B) & (kv_first_B <= q_last_B)).any()
        if not in_order:
            seen &= _slice(order_BT, pair[0], block, 1).max() >= pair[1] * block
        return jax.lax.cond(seen, add_pair, lambda carry, _: carry, carry, pair), None

    pairs = _pairs(q_ids_BT.shape[1] // block, kv_ids_BS.shape[1] // block, in_order)
    return jax.lax.scan(step, start, pairs)[0]


def _spans(ids_BT: jax.Array, block: int) -> jax.Array:
    """[T / A, 2, B]: each block's least and greatest segment; of a block of filling, none."""
    ids_BUA = ids_BT.reshape(ids_BT.shape[0], -1, block)
    none = jnp.iinfo(ids_BT.dtype).max
    first_BU = jnp.where(ids_BUA > 0, ids_BUA, none).min(2)
    return jnp.stack([first_BU, ids_BUA.max(2)]).transpose(2, 0, 1)


def _block(S: int) -> int:
    return SHORT_BLOCK if S < LONG_FROM else LONG_BLOCK


def _queries(x_BTNH: jax.Array, K: int, block: int) -> jax.Array:
    """[B, K, G, T, H], T filled up to whole blocks."""
    B, _, N, H = x_BTNH.shape
    return _pad(x_BTNH, block).reshape(B, -1, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _from_queries(x_BKGTH: jax.Array, T: int) -> jax.Array:
    B, K, G, _, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, -1, K * G, H)[:, :T]


def _keys(x_BSKH: jax.Array, block: int) -> jax.Array:
    return _pad(x_BSKH, block).transpose(0, 2, 1, 3)


def _rows_of(
    block: int, q_ids_BT: jax.Array, kv_ids_BS: jax.Array, order_BT: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Segment ids and places. What fills up is of segment 0, which sees nothing and isn't seen."""
    order_BT = place_in_row(q_ids_BT) if order_BT is None else order_BT
    order_BT = varying_like(order_BT, q_ids_BT)
    return tuple(_pad(x, block) for x in (q_ids_BT, kv_ids_BS, order_BT))


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
