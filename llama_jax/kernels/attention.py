"""Attention by backend name: the table of backends, and the layout that they run under.

B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
Backends see local arrays: heads split over the tensor axis, queries over context, and keys and
values gathered over context. `llama_jax.kernels.choice` says which backend `auto` is.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from llama_jax.kernels.blockwise import blockwise_attention
from llama_jax.kernels.choice import (
    PLATFORMS,
    Device,
    Shape,
    choose_backend,
    current_device,
)
from llama_jax.kernels.cudnn import cudnn_attention
from llama_jax.kernels.reference import reference_attention
from llama_jax.kernels.ring import BLOCKWISE_PARTS, Parts, ring_attention
from llama_jax.kernels.ring_splash import splash_parts
from llama_jax.kernels.splash import splash_attention
from llama_jax.sharding.rules import axis_size, on_shards
from llama_jax.sharding.zigzag import in_natural_order, local_places

Backend = Callable[..., jax.Array]

BACKENDS: dict[str, Backend] = {
    "reference": reference_attention,
    "blockwise": blockwise_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}
# What attends to one shard's keys in the ring form.
RING_PARTS: dict[str, Callable[..., Parts]] = {
    "blockwise": lambda: BLOCKWISE_PARTS,
    "splash": splash_parts,
}


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    backend: str,
    context: Literal["gather", "ring"] = "gather",
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments: [B, T, N, H] in q's dtype.

    A query sees the keys of its own segment at or before its own place in the row; positions
    only turn the rotary embedding. Segment 0 is padding, whose output and gradients are 0.
    Rows split over the context axis are in zigzag order (`llama_jax.sharding.zigzag`).

    Args:
      k_BSKH: K divides N, and what the tensor axis holds divides K.
      backend: "auto" or a name in `BACKENDS`.
      context: how queries meet the keys of the context axis' other shards: gathered, or as these
        go round.
      interpret: run a TPU kernel's Python on any device, for tests.
    """
    device = current_device()
    ring = context == "ring" and axis_size("length") > 1
    shape = local_shape(q_BTNH.shape, k_BSKH.shape[1], q_BTNH.dtype)
    name = choose_backend(
        backend, shape, Device("tpu", device.kind) if interpret else device, ring=ring
    )
    options = {"device_kind": device.kind, "interpret": interpret} if name == "splash" else {}

    def local(
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        q_segment_ids_BT: jax.Array,
        kv_segment_ids_BS: jax.Array,
    ) -> jax.Array:
        if ring:
            return ring_attention(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                q_segment_ids_BT=q_segment_ids_BT,
                kv_segment_ids_BS=kv_segment_ids_BS,
                parts=RING_PARTS[name](**options),
            )
        # Gathered over context, keys come in the order in which its shards hold them.
        ways = axis_size("length")
        keys = (k_BSKH, v_BSKH, kv_segment_ids_BS)
        k_BSKH, v_BSKH, kv_segment_ids_BS = (in_natural_order(x, ways) for x in keys)
        return BACKENDS[name](
            q_BTNH,
            k_BSKH,
            v_BSKH,
            q_segment_ids_BT=q_segment_ids_BT,
            kv_segment_ids_BS=kv_segment_ids_BS,
            q_order_BT=_local_order(q_segment_ids_BT),
            **options,
        )

    key_length = "length" if ring else "key_length"
    queries = ("batch", "length", "q_heads", "head_dim")
    keys = ("batch", key_length, "kv_heads", "head_dim")
    q_ids, kv_ids = ("batch", "length"), ("batch", key_length)
    # Kernels don't say over which axes their outputs vary, so nothing can check it.
    checked = name not in PLATFORMS
    run = on_shards(local, (queries, keys, keys, q_ids, kv_ids), queries, check_types=checked)
    return run(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT, kv_segment_ids_BS)


def local_shape(q_shape: tuple[int, ...], kv_len: int, dtype: jnp.dtype) -> Shape:
    """One device's part of a call on the current mesh, of queries [B, T, N, H] in all."""
    B, T, _, H = q_shape
    return Shape(
        B // axis_size("batch"), T // axis_size("length"), kv_len, H, jnp.dtype(dtype).name
    )


def _local_order(q_segment_ids_BT: jax.Array) -> jax.Array | None:
    """int32 [B, T]: places of this shard's queries in their rows; None for 0, 1, 2, ..."""
    if axis_size("length") == 1:
        return None
    return jnp.broadcast_to(local_places(q_segment_ids_BT.shape[1]), q_segment_ids_BT.shape)
