"""Axis sizes against the devices there are."""

import jax
import pytest
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
