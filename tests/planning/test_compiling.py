"""Compiling for TPUs that aren't there: what fits, what doesn't, and what is told of it."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

pytest.importorskip("libtpu")

from tiny_runs import TINY

from llama_jax.config.hardware import find_slice
from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig
from llama_jax.planning import compiling
from llama_jax.planning.compiling import (
    OutOfMemoryError,
    PlanError,
    compile_lowered,
    compile_step,
    lower_step,
    prepare_compiler,
    topology_devices,
    topology_options,
)
from llama_jax.sharding.mesh import make_mesh


@pytest.mark.parametrize(
    ("name", "slices", "devices", "kind"),
    [
        ("v4-8", 1, 4, "TPU v4"),
        ("v5e-1", 1, 1, "TPU v5 lite"),
        ("v5e-256", 1, 256, "TPU v5 lite"),
        ("v5p-128", 1, 64, "TPU v5"),
        ("v6e-16", 2, 32, "TPU v6 lite"),
        ("tpu7x-16", 1, 16, "TPU7x"),
    ],
)
def test_a_topology_has_the_devices_that_jax_would_see(name, slices, devices, kind):
    found = topology_devices(find_slice(name), slices)
    assert (len(found), {device.device_kind for device in found}) == (devices, {kind})
    if slices > 1:
        assert {device.slice_index for device in found} == set(range(slices))


def test_where_the_ends_of_a_slice_are_joined_gathers_compile_to_gathers():
    slice_ = find_slice("v5p-128")
    assert topology_options(slice_)["wrap"] == (True, True, True)
    assert "wrap" not in topology_options(find_slice("v5p-8"))
    mesh = make_mesh(MeshConfig(), topology_devices(slice_))
    split, whole = (jax.NamedSharding(mesh, jax.P(axes)) for axes in ("fsdp", None))
    x = jax.ShapeDtypeStruct((4096, 1024), jax.numpy.bfloat16, sharding=split)
    with jax.set_mesh(mesh):
        gather = jax.jit(lambda x: jax.reshard(x, whole) * 2)
        text = gather.lower(x).compile().as_text()
    assert "all-gather" in text
    assert "all-reduce" not in text


@pytest.mark.short
def test_a_step_compiles_and_its_memory_is_known():
    compiled = compile_step(TINY, find_slice("v5e-1"), 1, {})
    parts, memory = compiled.state_bytes, compiled.memory
    # float32 parameters and two moments of them, and five arrays of B x T.
    params = 4 * 459_392
    assert parts.params == parts.gradients == params
    assert parts.optimizer == pytest.approx(2 * params, rel=1e-4)
    assert parts.batch == 5 * 4 * 8 * 128
    held = parts.params + parts.optimizer + parts.batch
    assert held <= memory.argument_bytes < 1.05 * held
    assert memory.argument_bytes + memory.temp_bytes <= 1.01 * memory.peak_bytes
    assert memory.host_bytes == 0
    assert compiled.text.startswith("HloModule")
    assert compiled.held.by_category["parameters"] == params
    assert compiled.held.buffers[0].bytes >= compiled.held.buffers[-1].bytes > 0
    assert compiled.compile_s > 0


def test_a_flag_reaches_the_compiler():
    lowered = lower_step(TINY, find_slice("v5e-1"))
    with pytest.raises(PlanError, match="xla_no_such_flag"):
        compile_lowered(lowered, find_slice("v5e-1"), {"xla_no_such_flag": "true"})


def test_what_does_not_fit_says_how_much_it_needs(monkeypatch):
    # A program without a model: what overflows is known to the byte.
    shape = jax.ShapeDtypeStruct(
        (65536, 65536),
        jax.numpy.bfloat16,
        sharding=jax.sharding.SingleDeviceSharding(topology_devices(find_slice("v5e-1"))[0]),
    )
    stage = jax.jit(lambda x: (x + 1, x * 2)).lower(shape)
    lowered = dataclasses.replace(lower_step(TINY, find_slice("v5e-1")), stage=stage)
    with pytest.raises(OutOfMemoryError, match=r"needs 24\.00 GiB .* has 15\.75 GiB") as caught:
        compile_lowered(lowered, find_slice("v5e-1"), {})
    assert caught.value.needed_bytes == pytest.approx(24 * 2**30, rel=1e-3)
    assert max(buffer.bytes for buffer in caught.value.held.buffers) == 8 * 2**30


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("for HLO temporaries (20.36G) exceeds available HBM (15.75G)", 20.36 * 2**30),
        ("Ran out of memory in memory space hbm. Used 18.5G of 15.75G hbm.", 18.5 * 2**30),
        ("something else", None),
    ],
)
def test_without_a_table_of_buffers_the_message_says_what_is_needed(message, needed):
    found = compiling._needed_bytes(message, "")
    assert found == (None if needed is None else round(needed))


def test_a_mesh_that_does_not_fit_the_slice_is_told_before_compiling():
    config = dataclasses.replace(TINY, mesh=MeshConfig(fsdp=3))
    with pytest.raises(ConfigError, match=r"mesh: data 1 x fsdp 3 .* but there are 4 devices"):
        lower_step(config, find_slice("v5e-4"))


def test_without_libtpu_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install 'llama-jax\[tpu\]'"):
        prepare_compiler()


def test_the_peak_leaves_out_what_is_in_the_hosts_memory():
    # Of the 8B model on a v5e-16 with three tensors of each layer offloaded, in MiB.
    sizes = {"peak_memory": 17010, "argument_size": 5747, "temp_size": 9373, "output_size": 5746,
             "alias_size": 5746, "generated_code_size": 59, "host_argument_size": 0,
             "host_temp_size": 11264}  # fmt: skip
    found = SimpleNamespace(**{f"{name}_in_bytes": size for name, size in sizes.items()})
    memory = compiling._memory(SimpleNamespace(memory_analysis=lambda: found))
    assert memory.peak_bytes == 5747 + 9373
    assert memory.host_bytes == 11264
    found.peak_memory_in_bytes = 15000
    assert compiling._memory(SimpleNamespace(memory_analysis=lambda: found)).peak_bytes == 15000
