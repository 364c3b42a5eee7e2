"""Ring attention: keys and values go round the context axis, so that no device holds all of them.

Each shard's queries meet one other shard's keys at a time while those of the next are on their way;
partial outputs are merged by their log-sum-exp (arXiv 2310.01889). Rows are in zigzag order, in
which every meeting of two shards is half of the work of one without a mask (`sharding.zigzag`). The
backward pass goes round as well, and the gradients of keys and values travel with them.
B batch, T queries and S = T keys of a shard, N query heads, K key-value heads, H head dim.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.kernels.blockwise import partial_attention, partial_attention_gradients
from llama_jax.kernels.reference import MASKED
from llama_jax.sharding.rules import axis_size, pass_on, shard_index, varying_like


class Parts(NamedTuple):
    """Attention over a part of the keys: how its output and its gradients are made.

    Signatures and results are those of `blockwise.partial_attention` and
    `blockwise.partial_attention_gradients`.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    gradients: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


BLOCKWISE_PARTS = Parts(partial_attention, partial_attention_gradients)


class _Travelling(NamedTuple):
    """What goes round: one shard's keys with their segments, and in the backward pass gradients."""

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    grads: tuple[jax.Array, ...] = ()

    def pass_on(self) -> "_Travelling":
        return jax.tree.map(lambda x: pass_on(x, "length"), self)


def ring_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    parts: Parts = BLOCKWISE_PARTS,
) -> jax.Array:
    """The same function as `reference_attention` over the whole row; call it inside `on_shards`.

    Args:
      q_BTNH, k_BSKH, v_BSKH: this shard's, in zigzag order.
      parts: what attends to one shard's keys.
    """
    ids = varying_like(q_segment_ids_BT, q_BTNH), varying_like(kv_segment_ids_BS, q_BTNH)
    k_BSKH, v_BSKH = (varying_like(x, q_BTNH) for x in (k_BSKH, v_BSKH))
    out_BTNH: jax.Array = _ring(parts, q_BTNH, k_BSKH, v_BSKH, *ids)
    # To the TPU kernel padding is a segment like others.
    return jnp.where((q_segment_ids_BT != 0)[..., None, None], out_BTNH, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(parts: Parts, *arrays: jax.Array) -> jax.Array:
    return _forward(parts, *arrays)[0]


def _forward(
    parts: Parts,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_ids_BT: jax.Array,
    kv_ids_BS: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def meet(round_: jax.Array | int, others: _Travelling) -> tuple[jax.Array, jax.Array]:
        return parts.forward(
            q_BTNH,
            others.k,
            others.v,
            q_segment_ids_BT=q_ids_BT,
            kv_segment_ids_BS=others.segment_ids,
            q_order_BT=_order(q_ids_BT, round_),
        )

    def step(
        carry: tuple[_Travelling, jax.Array, jax.Array], round_: jax.Array
    ) -> tuple[tuple[_Travelling, jax.Array, jax.Array], None]:
        others, out, log_total = carry
        # Sent before this round's work, to arrive while it is done.
        following = others.pass_on()
        return (following, *_merge(out, log_total, *meet(round_, others))), None

    last = axis_size("length") - 1
    out = varying_like(jnp.zeros(q_BTNH.shape, jnp.float32), q_BTNH)
    log_total = varying_like(jnp.full(q_BTNH.shape[:3], MASKED, jnp.float32), q_BTNH)
    start = (_Travelling(k_BSKH, v_BSKH, kv_ids_BS), out, log_total)
    # The last keys met are sent no further.
    (others, out, log_total), _ = jax.lax.scan(step, start, jnp.arange(last))
    out, log_total = _merge(out, log_total, *meet(last, others))
    # Named, so that a remat policy which keeps attention keeps all that its backward pass needs.
    out_BTNH = checkpoint_name(out.astype(q_BTNH.dtype), "attention")
    log_total_BTN = checkpoint_name(log_total, "attention")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, q_ids_BT, kv_ids_BS, out_BTNH, log_total_BTN)


def _backward(parts: Parts, saved: tuple[jax.Array, ...], grad_BTNH: jax.Array) -> tuple[Any, ...]:
    q_BTNH, k_BSKH, v_BSKH, q_ids_BT, kv_ids_BS, out_BTNH, log_total_BTN = saved

    def step(
        carry: tuple[_Travelling, jax.Array], round_: jax.Array
    ) -> tuple[tuple[_Travelling, jax.Array], None]:
        others, grad_q = carry
        grads = parts.gradients(
            q_BTNH,
            others.k,
            others.v,
            out_BTNH,
            log_total_BTN,
            grad_BTNH,
            q_segment_ids_BT=q_ids_BT,
            kv_segment_ids_BS=others.segment_ids,
            q_order_BT=_order(q_ids_BT, round_),
        )
        added = tuple(total + new for total, new in zip(others.grads, grads[1:], strict=True))
        return (others._replace(grads=added).pass_on(), grad_q + grads[0]), None

    def zeros(x: jax.Array) -> jax.Array:
        return varying_like(jnp.zeros(x.shape, jnp.float32), q_BTNH)

    own = _Travelling(k_BSKH, v_BSKH, kv_ids_BS, (zeros(k_BSKH), zeros(v_BSKH)))
    rounds = jnp.arange(axis_size("length"))
    (home, grad_q), _ = jax.lax.scan(step, (own, zeros(q_BTNH)), rounds)
    grads = (grad_q, *home.grads)
    typed = (g.astype(x.dtype) for g, x in zip(grads, (q_BTNH, k_BSKH, v_BSKH), strict=True))
    return (*typed, None, None)


_ring.defvjp(_forward, _backward)


def _merge(
    out: jax.Array, log_total: jax.Array, other: jax.Array, other_log_total: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of two parts' float32 outputs and log-sum-exps, those of both parts together."""
    total = jnp.logaddexp(log_total, other_log_total)
    share, other_share = (jnp.exp(x - total)[..., None] for x in (log_total, other_log_total))
    return share * out + other_share * other.astype(jnp.float32), total


def _order(q_ids_BT: jax.Array, round_: jax.Array | int) -> jax.Array:
    """int32 [B, T]: how many of the keys met in a round come before or at each query, less 1.

    Of an earlier shard's keys both halves of the queries see the early chunk; of a later shard's
    the late queries alone see anything, and that is all.
    """
    ways, here = axis_size("length"), shard_index("length")
    source = (here - round_) % ways
    length = q_ids_BT.shape[1]
    place = jnp.arange(length, dtype=jnp.int32)
    late = place >= length // 2
    after_source = jnp.full(length, length // 2 - 1, jnp.int32)
    before_source = jnp.where(late, length - 1, -1)
    order = jnp.where(source == here, place, jnp.where(source < here, after_source, before_source))
    return jnp.broadcast_to(order, q_ids_BT.shape)
