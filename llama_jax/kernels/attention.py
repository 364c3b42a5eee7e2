"""Attention by backend name: the table of backends, which one a device gets, and their layout.

B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
Backends see local arrays: heads split over the tensor axis, queries over context, and keys and
values gathered over context.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from llama_jax.config.loading import ConfigError
from llama_jax.kernels.blockwise import SHORT_BLOCK, blockwise_attention
from llama_jax.kernels.reference import reference_attention
from llama_jax.kernels.ring import BLOCKWISE_PARTS, Parts, ring_attention
from llama_jax.kernels.ring_splash import splash_parts
from llama_jax.kernels.splash import splash_attention
from llama_jax.sharding.rules import axis_size, current_mesh, on_shards
from llama_jax.sharding.zigzag import in_natural_order, local_places

Backend = Callable[..., jax.Array]
BackendName = Literal["reference", "blockwise", "splash"]

BACKENDS: dict[str, Backend] = {
    "reference": reference_attention,
    "blockwise": blockwise_attention,
    "splash": splash_attention,
}
# What attends to one shard's keys in the ring form.
RING_PARTS: dict[str, Callable[..., Parts]] = {
    "blockwise": lambda: BLOCKWISE_PARTS,
    "splash": splash_parts,
}
# Where a backend runs; those that aren't named here run everywhere.
PLATFORMS: dict[str, str] = {"splash": "tpu"}
# A shorter row is less than two blocks: blocks would have nothing to skip. From here on the
# blockwise backend is faster (CPU, forward and backward) and keeps no T x S array.
BLOCKWISE_FROM = 2 * SHORT_BLOCK


@dataclasses.dataclass(frozen=True)
class Device:
    """What attention is compiled for: JAX's platform ("tpu", "gpu", "cpu") and kind of device."""

    platform: str
    kind: str


def current_device() -> Device:
    """The kind of device of the mesh in use, also one of a topology; without a mesh, JAX's own."""
    abstract = current_mesh().abstract_device
    if abstract is not None:
        return Device(abstract.platform, abstract.device_kind)
    device = jax.local_devices()[0]
    return Device(device.platform, device.device_kind)


def choose_backend(name: str, kv_len: int, device: Device | None = None) -> str:
    """The backend that `auto` means on the device (default: the current one) for so many keys.

    On a TPU the kernel; elsewhere `reference` below `BLOCKWISE_FROM` and `blockwise` from there.

    Raises:
      ConfigError: a backend by name that doesn't run on the device.
    """
    device = device or current_device()
    if name != "auto":
        needed = PLATFORMS.get(name, device.platform)
        if needed != device.platform:
            raise ConfigError(
                f"'{name}' runs on {needed} only, and these devices are {device.platform} "
                f"({device.kind}); use auto",
                key="execution.attention",
            )
        return name
    if device.platform == "tpu":
        return "splash"
    return "blockwise" if kv_len >= BLOCKWISE_FROM else "reference"


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
    kernel_device = Device("tpu", device.kind) if interpret else device
    name = choose_backend(backend, k_BSKH.shape[1], kernel_device)
    ring = context == "ring" and axis_size("length") > 1
    if ring:
        name = _ring_backend(backend, name)
    kernel = name in PLATFORMS
    options = {"device_kind": device.kind, "interpret": interpret} if kernel else {}

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
    # Pallas calls don't say over which axes their outputs vary, so nothing can check it.
    run = on_shards(local, (queries, keys, keys, q_ids, kv_ids), queries, check_types=not kernel)
    return run(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT, kv_segment_ids_BS)


def _ring_backend(asked: str, name: str) -> str:
    if name in RING_PARTS:
        return name
    if asked == "auto":
        return "blockwise"
    raise ConfigError(
        f"'{name}' has no form that goes round a ring; use auto, {', '.join(RING_PARTS)}, or "
        "execution.context_attention = 'gather'",
        key="execution.attention",
    )


def _local_order(q_segment_ids_BT: jax.Array) -> jax.Array | None:
    """int32 [B, T]: places of this shard's queries in their rows; None for 0, 1, 2, ..."""
    if axis_size("length") == 1:
        return None
    return jnp.broadcast_to(local_places(q_segment_ids_BT.shape[1]), q_segment_ids_BT.shape)
