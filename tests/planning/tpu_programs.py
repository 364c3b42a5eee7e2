"""Small programs compiled for TPUs, and hand-written texts, for tests of what reads them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config.hardware import CHIPS
from llama_jax.planning.collectives import Layout
from llama_jax.planning.program import analyze

ONE = Layout({"x": 1})


@functools.cache
def devices(topology, num_slices=1):
    """The devices of slices that aren't there."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    options = {"num_slices": num_slices} if num_slices > 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return described.devices


def on_one(*shape, dtype=jnp.bfloat16, topology="v5e:2x2", memory_kind="device"):
    """An abstract array on one device."""
    place = SingleDeviceSharding(devices(topology)[0], memory_kind=memory_kind)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def on_mesh(mesh, shape, spec, dtype=jnp.bfloat16):
    """An abstract array laid out over a mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def compiled(function, *arguments, options=None, **jit):
    """The function compiled for the devices of its arguments."""
    return jax.jit(function, **jit).lower(*arguments).compile(compiler_options=options)


def analysis(text, *, chip="v5e", layout=ONE, **options):
    """What `analyze` reads in a text, by default of one v5e."""
    return analyze(text, CHIPS[chip], layout, **options)


def module(*computations):
    """A module's text of computations, the last the entry."""
    return "HloModule test\n\n" + "\n\n".join(computations) + "\n"
