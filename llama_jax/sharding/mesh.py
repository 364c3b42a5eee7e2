"""The device mesh: its axes, their sizes resolved against the devices, and who sits where.

`data` holds replicas (across slices), `fsdp` shards parameters and batch, `context` shards the
sequence, `tensor` shards heads, MLP width and vocabulary. Every axis is Explicit: an array's type
says how it is laid out, and an ambiguous contraction is an error at trace time. On TPUs the places
come from `mesh_utils`: neighbours on an axis are neighbours on the chips' network, and only `data`
crosses from slice to slice, over the data centre's network.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh over `devices` (default: all) with the axes of `AXES`, all of type Explicit.

    `devices` may be those of a topology that isn't there, for compiling ahead of time. Devices
    other than TPUs keep their order.

    Raises:
      ConfigError: the sizes don't multiply to the number of devices, or the number of slices
        doesn't divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    return Mesh(_grid(sizes, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


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


def num_slices(devices: Sequence[Any]) -> int:
    """Over how many slices the devices lie: networks of chips that only the data centre joins."""
    return len({getattr(device, "slice_index", None) for device in devices})


def _grid(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices in an array of the mesh's shape."""
    if devices[0].platform != "tpu":
        return np.asarray(devices, object).reshape(sizes)
    slices = num_slices(devices)
    data, *inner = sizes
    if data % slices:
        raise ConfigError(
            f"data {data} is not a multiple of the {slices} slices; only this axis may cross from "
            f"slice to slice, so data {slices} fits, with the other axes inside of a slice",
            key="mesh.data",
        )
    shape = (data // slices, *inner)
    # JAX's ring orders for slices of up to 16 chips are for one axis over all of the slice; cut
    # into several axes they leave neighbours up to 4 hops apart, so those chips hide their kind.
    one_axis = max(shape) == math.prod(shape)
    places = devices if one_axis else [_Place.of(device) for device in devices]
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, places, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            shape, (slices, 1, 1, 1), places, allow_split_physical_axes=True
        )
    return grid if one_axis else np.vectorize(lambda place: place.device, otypes=[object])(grid)


class _Place(NamedTuple):
    """Where a TPU device sits, without the kind for which JAX keeps a fixed order."""

    coords: tuple[int, ...]
    core_on_chip: int
    slice_index: int | None
    device_kind: str
    device: Any
    platform: str = "tpu"

    @classmethod
    def of(cls, device: Any) -> "_Place":
        # Chips that are two devices each need a kind for which `mesh_utils` has an axis of cores.
        kind = "TPU v5p" if device.device_kind.startswith("TPU7") else "TPU"
        index = getattr(device, "slice_index", None)
        return cls(tuple(device.coords), device.core_on_chip, index, kind, device)


def _product(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != -1)
