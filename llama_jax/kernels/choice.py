"""Which attention backend runs: what `auto` means on a device, and what a backend by name needs.

TPU: `splash`. GPU: `cudnn` where cuDNN takes the shapes and the bias of packed rows stays small.
Elsewhere, and where the rule of a kernel isn't met: `blockwise`, or `reference` for short rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.kernels.blockwise import SHORT_BLOCK
from llama_jax.kernels.cudnn import bias_bytes, unsupported
from llama_jax.sharding.rules import current_mesh

NAMES = ("reference", "blockwise", "splash", "cudnn")
# Where a backend runs; those that aren't named here run everywhere.
PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}
# Those that have a form for keys that go round the shards of the context axis.
RING = ("blockwise", "splash")
# A shorter row is less than two blocks: blocks would have nothing to skip. From here on the
# blockwise backend is faster (CPU, forward and backward) and keeps no T x S array.
BLOCKWISE_FROM = 2 * SHORT_BLOCK
# cuDNN packs rows through a bias of T x S; `auto` prefers blocks to a larger one.
LARGEST_BIAS_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """What attention is compiled for: JAX's platform ("tpu", "gpu", "cpu") and kind of device."""

    platform: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Shape:
    """One device's part of an attention call: rows, queries and keys a row, head dim, dtype."""

    rows: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str


def current_device() -> Device:
    """The kind of device of the mesh in use, also one of a topology; without a mesh, JAX's own."""
    abstract = current_mesh().abstract_device
    if abstract is not None:
        return Device(abstract.platform, abstract.device_kind)
    device = jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore
    return Device(device.platform, device.device_kind)


def choose_backend(name: str, shape: Shape, device: Device, *, ring: bool = False) -> str:
    """The backend that runs: `name`, or for "auto" the best one for the device and shape.

    Args:
      ring: keys go round the context axis instead of being gathered.

    Raises:
      ConfigError: a backend by name that can't run there.
    """
    if name != "auto":
        _check(name, shape, device, ring=ring)
        return name
    if device.platform == "tpu":
        return "splash"
    if ring:
        return "blockwise"
    fits = unsupported(shape.dtype, shape.head_dim, shape.q_len, shape.kv_len) is None
    if device.platform == "gpu" and fits and _bias(shape) <= LARGEST_BIAS_BYTES:
        return "cudnn"
    return "blockwise" if shape.kv_len >= BLOCKWISE_FROM else "reference"


def describe_choice(name: str, asked: str, shape: Shape, device: Device) -> str:
    """One line for the start of a run: the backend, why, and what it costs."""
    text = f"attention: {name} on {device.kind}"
    if asked == "auto" and device.platform == "gpu" and name != "cudnn":
        why = unsupported(shape.dtype, shape.head_dim, shape.q_len, shape.kv_len)
        why = why or f"its bias for packed rows would take {_bias(shape) / 2**30:.1f} GiB"
        text += f"; not cudnn: {why}"
    if name == "cudnn":
        text += f", packed rows by a bias of {_bias(shape) / 2**20:.0f} MiB"
    return text


def _check(name: str, shape: Shape, device: Device, *, ring: bool) -> None:
    key = "execution.attention"
    if name not in NAMES:
        raise ConfigError(f"no backend '{name}'{nearest(name, NAMES)}", key=key)
    needed = PLATFORMS.get(name, device.platform)
    if needed != device.platform:
        raise ConfigError(
            f"'{name}' runs on {needed} only, and these devices are {device.platform} "
            f"({device.kind}); use auto",
            key=key,
        )
    if ring and name not in RING:
        raise ConfigError(
            f"'{name}' has no form that goes round a ring; use auto, {', '.join(RING)}, or "
            "execution.context_attention = 'gather'",
            key=key,
        )
    if name == "cudnn":
        why = unsupported(shape.dtype, shape.head_dim, shape.q_len, shape.kv_len)
        if why is not None:
            raise ConfigError(f"cudnn can't run: {why}; use auto", key=key)


def _bias(shape: Shape) -> int:
    return bias_bytes(shape.rows, shape.q_len, shape.kv_len, jnp.dtype(shape.dtype).itemsize)
