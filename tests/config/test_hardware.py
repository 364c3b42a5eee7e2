"""Chips and slices against the published tables."""

import pytest

from llama_jax.config.hardware import (
    CHIPS,
    SLICES,
    TOPOLOGIES,
    chip_of,
    find_slice,
    peak_flops,
    wraps,
)
from llama_jax.config.loading import ConfigError


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v2", 22.5e12),
        ("TPU v4", 275e12),
        ("TPU v4 lite", 138e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_by_its_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_a_device_kind_names_its_chip_and_nothing_else_does():
    kinds = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
    assert [chip_of(kind) for kind in kinds] == list(CHIPS.values())
    assert [chip_of(kind) for kind in ("TPU v4 lite", "NVIDIA H100", "cpu")] == [None] * 3


def test_a_device_of_ironwood_is_half_a_chip():
    chip = CHIPS["tpu7x"]
    assert chip.device_peak_flops() == 1153.5e12
    assert chip.device_hbm_bytes_per_s == 3690e9
    assert chip.device_usable_hbm_bytes == int(94.74 * 2**30)
    assert CHIPS["v5e"].device_peak_flops("fp8") is None


@pytest.mark.parametrize(
    ("text", "topology_name", "num_chips", "num_devices", "name", "accelerator_type"),
    [
        ("v5e:4x4", "v5e:4x4", 16, 16, "v5e-16", "v5litepod-16"),
        ("v5e-16", "v5e:4x4", 16, 16, "v5e-16", "v5litepod-16"),
        ("v5litepod-16", "v5e:4x4", 16, 16, "v5e-16", "v5litepod-16"),
        ("v4-8", "v4:2x2x1", 4, 4, "v4-8", "v4-8"),
        ("v5p-8", "v5p:2x2x1", 4, 4, "v5p-8", "v5p-8"),
        ("v5p-1024", "v5p:8x8x8", 512, 512, "v5p-1024", "v5p-1024"),
        ("v5:4x4x4", "v5p:4x4x4", 64, 64, "v5p-128", "v5p-128"),
        ("v5p:4x4x20", "v5p:4x4x20", 320, 320, "v5p-640", "v5p-640"),
        ("v6e-256", "v6e:16x16", 256, 256, "v6e-256", "v6e-256"),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128, "tpu7x-128", "tpu7x-128"),
        ("v7x:2x2x1", "tpu7x:2x2x1", 4, 8, "tpu7x-8", "tpu7x-8"),
    ],
)
def test_a_slice_is_found_by_any_of_its_names(
    text, topology_name, num_chips, num_devices, name, accelerator_type
):
    found = find_slice(text)
    assert found.topology_name == topology_name
    assert (found.num_chips, found.num_devices) == (num_chips, num_devices)
    assert (found.name, found.accelerator_type) == (name, accelerator_type)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e-24", "no slice is called 'v5e-24' (did you mean 'v5e-32'?)"),
        ("v9-8", "no TPU chip is called 'v9', in 'v9-8'"),
        ("v5e:4x5", "v5e has no slice of shape '4x5' (did you mean '"),
        ("v5p:2x3x1", "v5p has no slice of shape '2x3x1' (did you mean '2x2x1'?)"),
        ("v5p", "no slice is called 'v5p' ("),
    ],
)
def test_an_unknown_slice_is_refused_with_the_nearest(text, message):
    with pytest.raises(ConfigError) as caught:
        find_slice(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("v5e:4x4", (False, False)),
        ("v5e:8x16", (False, True)),
        ("v6e:16x16", (True, True)),
        ("v5p:2x4x4", (False, True, True)),
        ("v5p:2x2x1", (False, False, False)),
        ("tpu7x:4x4x4", (True, True, True)),
    ],
)
def test_an_axis_wraps_where_the_torus_is_closed(text, axes):
    assert wraps(find_slice(text)) == axes


def test_hosts_are_of_four_chips_once_there_are_several():
    counts = {name: find_slice(name).num_hosts for name in ("v5e-8", "v5e-16", "v5p-8", "v5p-128")}
    assert counts == {"v5e-8": 1, "v5e-16": 4, "v5p-8": 1, "v5p-128": 16}


def test_no_two_slices_share_a_name():
    assert len(SLICES) == sum(map(len, TOPOLOGIES.values()))


def test_the_compiler_agrees_on_devices_and_kind_of_each_family():
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    for text in ("v4-8", "v5e-16", "v5p-16", "v6e-8", "tpu7x-16"):
        part = find_slice(text)
        options = {"chip_config_name": part.chip.chip_config_name}
        options = {key: value for key, value in options.items() if value}
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=part.topology_name, **options
        )
        assert len(described.devices) == part.num_devices
        assert {chip_of(device.device_kind) for device in described.devices} == {part.chip}
