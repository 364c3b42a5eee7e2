"""Axis sizes against the devices there are, and where the chips of a slice stand on the axes."""

import itertools
import math

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig
from llama_jax.sharding.mesh import AXES, axis_sizes, make_mesh


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(data=2), (2, 4, 1, 1)),
        (MeshConfig(fsdp=2, tensor=-1), (1, 2, 1, 4)),
        (MeshConfig(data=-1, fsdp=1, context=2, tensor=2), (2, 1, 2, 2)),
        (MeshConfig(fsdp=8), (1, 8, 1, 1)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(config, sizes):
    assert axis_sizes(config, 8) == sizes
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == sizes
    assert set(mesh.axis_types) == {AxisType.Explicit}


def test_a_mesh_may_take_some_of_the_devices():
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    assert mesh.shape["fsdp"] == 2
    assert list(mesh.devices.flat) == jax.devices()[:2]


def test_sizes_that_do_not_multiply_to_the_devices_are_refused_with_the_product():
    with pytest.raises(ConfigError, match=r"^mesh: data 1 x fsdp 3 x .* = 3, but there are 8 dev"):
        axis_sizes(MeshConfig(fsdp=3), 8)


def test_an_open_axis_with_nothing_whole_left_is_named():
    with pytest.raises(ConfigError, match=r"^mesh\.fsdp: data 3 .*3 does not divide the 8 devices"):
        axis_sizes(MeshConfig(data=3), 8)


def tpu_devices(name, num_slices=1):
    pytest.importorskip("libtpu")
    options = {"num_slices": num_slices} if num_slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def hops(mesh, axis):
    """The longest way between neighbours on an axis, in links of the chips' network."""
    grid = np.moveaxis(mesh.devices, AXES.index(axis), 0)
    pairs = zip(grid[:-1].ravel(), grid[1:].ravel(), strict=True)
    return max(sum(abs(a - b) for a, b in zip(p.coords, q.coords, strict=True)) for p, q in pairs)


@pytest.mark.parametrize(
    ("topology", "config"),
    [
        ("v5e:4x4", MeshConfig(fsdp=16)),  # a ring through the whole slice
        ("v5e:4x4", MeshConfig(fsdp=4, tensor=4)),
        ("v5e:2x2", MeshConfig(fsdp=2, tensor=2)),
        ("v5e:2x4", MeshConfig(fsdp=4, tensor=2)),  # JAX's own order has 3 hops here
        ("v6e:4x4", MeshConfig(fsdp=4, context=4)),
        ("v5p:4x4x4", MeshConfig(fsdp=4, context=4, tensor=4)),
        ("tpu7x:2x2x1", MeshConfig(fsdp=2, context=2, tensor=2)),
    ],
)
def test_neighbours_on_an_axis_are_neighbours_on_the_chips_network(topology, config):
    devices = tpu_devices(topology)
    mesh = make_mesh(config, devices)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    for axis, size in mesh.shape.items():
        assert size == 1 or hops(mesh, axis) <= 1, axis  # 0: the two halves of a chip


def test_every_way_to_cut_a_slice_into_four_axes_is_a_mesh():
    for topology in ("v6e:4x4", "v5p:2x2x4"):
        devices = tpu_devices(topology)
        powers = [n for n in itertools.product((1, 2, 4, 8, 16), repeat=4) if math.prod(n) == 16]
        for sizes in powers:
            mesh = make_mesh(MeshConfig(*sizes), devices)
            assert mesh.devices.shape == sizes
            assert len({device.id for device in mesh.devices.flat}) == 16


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4"])
@pytest.mark.parametrize("sizes", [(2, 16, 1, 1), (2, 4, 2, 2), (4, 2, 1, 4), (8, 4, 1, 1)])
def test_only_the_data_axis_crosses_slices(topology, sizes):
    mesh = make_mesh(MeshConfig(*sizes), tpu_devices(topology, num_slices=2))
    half = sizes[0] // 2
    for start, number in ((0, 0), (half, 1)):
        slices = {d.slice_index for d in mesh.devices[start : start + half].flat}
        assert slices == {number}


def test_a_data_axis_that_the_slices_do_not_divide_is_refused_with_the_size_that_fits():
    devices = tpu_devices("v5e:4x4", num_slices=2)
    with pytest.raises(ConfigError, match=r"^mesh\.data: data 1 is not .* 2 slices.* data 2 fits"):
        make_mesh(MeshConfig(), devices)
