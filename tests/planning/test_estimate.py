"""Times against the method's own figures for published programs, and by hand."""

import dataclasses

import pytest

from llama_jax.config.hardware import CHIPS, find_slice
from llama_jax.planning.collectives import Collective
from llama_jax.planning.estimate import estimate, ici_bytes_per_s
from llama_jax.planning.program import Analysis

NOTHING = Analysis(
    executed_flops=0,
    dot_flops=0,
    attention_flops=0,
    kernel_flops=0,
    hbm_traffic_bytes=0,
    host_traffic_bytes=0,
    collectives=(),
    kernel_calls={},
    uncounted_kernels={},
    loops={},
    mxu_s=0.0,
    memory_s=0.0,
)


def times(slice_name, **figures):
    slice_ = find_slice(slice_name)
    return estimate(dataclasses.replace(NOTHING, **figures), slice_.chip, slice_)


def gather(gigabytes, kind="all-gather", **more):
    fields = {"axis": "fsdp", "count": 1, "overlapped": False, "form": "sync", **more}
    return Collective(kind=kind, bytes=int(gigabytes * 1e9), **fields)


@pytest.mark.parametrize(
    ("slice_name", "gigabytes_per_s"),
    [
        ("v5e-16", 90),
        ("v5e-64", 90),
        ("v5e-256", 180),
        ("v6e-16", 180),
        ("v6e-256", 360),
        ("v5p-8", 180),
        ("v5p-16", 270),
        ("v5p-64", 270),
        ("v5p-128", 540),
        ("v5p-1024", 540),
        ("tpu7x-128", 300),
    ],
)
def test_the_links_of_a_slice_carry_what_the_method_assumes(slice_name, gigabytes_per_s):
    assert ici_bytes_per_s(find_slice(slice_name)) == gigabytes_per_s * 1e9


def test_a_mesh_axis_has_only_the_links_of_the_torus_axes_that_it_takes():
    cube = find_slice("v5p-128")
    assert ici_bytes_per_s(cube, ((2, 4),)) == 180e9
    # Two of four places are a line, not a ring.
    assert ici_bytes_per_s(cube, ((2, 2),)) == 90e9
    assert ici_bytes_per_s(cube, ((0, 4), (1, 4), (2, 4))) == ici_bytes_per_s(cube)


# Programs measured by the method that this follows: its seconds, from its FLOPs and gigabytes.
@pytest.mark.parametrize(
    ("slice_name", "dot_tflop", "attention_tflop", "gathered", "scattered", "reduced", "expected"),
    [
        ("v5p-128", 8528.4, 967.6, 278.0, 0, 141.1, (20.69, 4.22, 1.04)),
        ("v5p-1024", 49484.3, 2493.7, 1644.4, 0, 824.3, (113.24, 10.87, 6.11)),
        ("v6e-16", 939.3, 193.5, 30.0, 0, 16.1, (1.23, 0.84, 0.35)),
        ("v5p-8", 939.3, 193.5, 30.0, 15.0, 1.1, (2.47, 0.84, 0.26)),
        ("tpu7x-128", 8308.5, 615.7, 278.0, 136.9, 4.2, (7.74, 2.14, 1.41)),
        ("v5e-256", 469.6, 96.8, 28.9, 0, 17.1, (2.88, 0.98, 0.35)),
    ],
)
def test_published_programs_come_out_as_in_their_table(
    slice_name, dot_tflop, attention_tflop, gathered, scattered, reduced, expected
):
    found = times(
        slice_name,
        executed_flops=int((dot_tflop + attention_tflop) * 1e12),
        attention_flops=int(attention_tflop * 1e12),
        collectives=(
            gather(gathered),
            gather(scattered, "reduce-scatter"),
            gather(reduced, "all-reduce"),
        ),
    )
    compute, attention, ici = expected
    assert found.compute == pytest.approx(compute, abs=0.006)
    # Of the estimate, only the kernels' part is in these figures.
    assert found.estimate == pytest.approx(attention, abs=0.006)
    assert found.ici == pytest.approx(ici, abs=0.02)


def test_an_estimate_is_products_memory_and_kernels_one_after_the_other():
    found = times("v5e-16", mxu_s=3.0, memory_s=0.7, attention_flops=int(197e12 * 0.25))
    assert found.estimate == pytest.approx(3.0 + 0.7 + 0.5)


def test_products_of_low_precision_run_at_their_own_peak_where_there_is_one():
    low = {"executed_flops": int(3e12), "dots_by_type": {"bf16": int(1e12), "int8": int(2e12)}}
    assert times("v5e-16", **low).compute == pytest.approx(1 / 197 + 2 / 393)
    fp8 = {**low, "dots_by_type": {"bf16": int(1e12), "fp8": int(2e12)}}
    assert times("v5e-16", **fp8).compute == pytest.approx(3 / 197)


def test_permutes_go_over_one_axis_and_two_links():
    found = times("v5e-16", collectives=(gather(37.0, "collective-permute"),))
    assert found.ici == pytest.approx(37.0 / 90)


def test_bytes_between_slices_take_the_chips_share_of_the_network():
    across = gather(6.25, "all-reduce", num_slices=2)
    found = times("v5p-128", collectives=(across,))
    # A sum over two slices: each sends half, then half of the result.
    assert (found.ici, found.dcn) == (0, pytest.approx(1.0))
    four = times("v5p-128", collectives=(dataclasses.replace(across, num_slices=4),))
    assert four.dcn == pytest.approx(1.5)


def test_memory_bounds_are_of_a_device():
    found = times("tpu7x-128", hbm_traffic_bytes=int(3690e9), host_traffic_bytes=int(7.5e9))
    assert (found.hbm, found.host) == (pytest.approx(1.0), pytest.approx(1.0))
    assert CHIPS["tpu7x"].hbm_bytes_per_s == 7380e9
