"""Batches between hosts and devices: which rows this host must read, and their global arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config.loading import ConfigError
from llama_jax.data.fields import BY_RESPONSE
from llama_jax.data.rows import Batch
from llama_jax.sharding.rules import axis_size, batch_sharding


def host_rows(
    mesh: Mesh,
    batch_size: int,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> np.ndarray:
    """The rows of a global batch that stand on this host's devices, increasing.

    Hosts that share a row, because a tensor or context axis runs across them, both read it; no
    host reads a row that none of its devices holds.

    Args:
      mesh: the run's mesh.
      batch_size: B.
      devices: the host's devices; default, those of this process.

    Raises:
      ConfigError: the mesh doesn't divide the batch.
    """
    ways = axis_size("batch", mesh)
    if batch_size % ways:
        raise ConfigError(
            f"{batch_size} rows don't divide over the {ways} shards of the batch on this mesh; "
            f"a multiple of {ways} fits",
            key="data.batch_size",
        )
    sharding = batch_sharding(mesh)
    local = sharding.addressable_devices if devices is None else set(devices)
    # One column for each shard of the length: any T that the mesh divides gives the same rows.
    shape = (batch_size, axis_size("length", mesh))
    places = sharding.devices_indices_map(shape)
    held = {index[0].indices(batch_size)[:2] for device, index in places.items() if device in local}
    return np.concatenate([np.arange(*span) for span in sorted(held)])


def field_sharding(name: str, mesh: Mesh) -> NamedSharding:
    """How a field of a batch lies on the mesh: split by rows, and by length where it has one."""
    sharding = batch_sharding(mesh)
    if name in BY_RESPONSE:
        return NamedSharding(mesh, PartitionSpec(sharding.spec[0]))
    return sharding


def to_device(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, laid out over the mesh by `field_sharding`, from each host's `host_rows`."""
    ways = axis_size("batch", mesh)
    shards_here = len(host_rows(mesh, ways))
    rows_here = len(batch["tokens"])
    batch_size = rows_here * ways // shards_here
    place_of_row = {int(row): i for i, row in enumerate(host_rows(mesh, batch_size))}

    def shard(array: np.ndarray, index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        first = place_of_row[start]
        return array[(slice(first, first + stop - start), *index[1:])]

    return {
        name: jax.make_array_from_callback(
            (batch_size, *array.shape[1:]),
            field_sharding(name, mesh),
            lambda index, array=array: shard(array, index),
        )
        for name, array in batch.items()
    }
