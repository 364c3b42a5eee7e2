"""The device mesh: its axes, and their sizes resolved against the devices there are.

`data` holds replicas (across slices), `fsdp` shards parameters and batch, `context` shards the
sequence, `tensor` shards heads, MLP width and vocabulary. Every axis is Explicit: an array's type
says how it is laid out, and an ambiguous contraction is an error at trace time.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh over `devices` (default: all) with the axes of `AXES`, all of type Explicit.

    Raises:
      ConfigError: the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    kinds = (AxisType.Explicit,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def axis_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """The size of each axis in the order of `AXES`, with -1 resolved.

    Raises:
      ConfigError: the sizes don't multiply to `num_devices`.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axis = next((axis for axis, size in sizes.items() if size == -1), None)
    if open_axis is None and fixed != num_devices:
        raise ConfigError(
            f"{_product(sizes)} = {fixed}, but there are {num_devices} devices; "
            "set one axis to -1 to take what is left",
            key="mesh",
        )
    if open_axis is not None and num_devices % fixed:
        raise ConfigError(
            f"{_product(sizes)}: {fixed} does not divide the {num_devices} devices, "
            f"so nothing whole is left for {open_axis}",
            key=f"mesh.{open_axis}",
        )
    return tuple(num_devices // fixed if size == -1 else size for size in sizes.values())


def _product(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != -1)
