"""Bytes that instructions move, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from tpu_programs import analysis, compiled, module, on_one

from llama_jax.planning.program_shapes import leaves, nbytes
from llama_jax.planning.program_text import parse
from llama_jax.planning.traffic import Counter

HBM = "{1,0:T(8,128)}"
VMEM = "{1,0:T(8,128)S(1)}"
HOST = "{1,0:T(8,128)S(5)}"
KIB = 1024
BIG = f"f32[256,128]{HBM}"  # 128 KiB


def moved(entry, *computations):
    """Traffic of the instruction `%x`."""
    program = parse(module(*computations, f"ENTRY %main (a: f32[1]) -> f32[1] {{\n{entry}\n}}"))
    where = program.computations["main"]
    return tuple(Counter(program).traffic(where, where.instructions["x"]))


def test_a_shape_is_its_arrays_with_types_sizes_and_memories():
    text = (
        "(s32[]{:T(128)}, /*index=1*/bf16[8,4096]{1,0:T(8,128)(2,1)S(1)}, f8e4m3fn[16]{0}, "
        "s4[3]{0}, pred[<=8]{0:S(5)}, token[])"
    )
    assert [leaf.dims for leaf in leaves(text)] == [(), (8, 4096), (16,), (3,), (8,), ()]
    assert [leaf.nbytes for leaf in leaves(text)] == [4, 65536, 16, 2, 8, 0]
    assert [leaf.space for leaf in leaves(text)] == [0, 1, 0, 0, 5, 0]
    assert nbytes(text, space=1) == 65536
    with pytest.raises(ValueError, match="'q7' is not known"):
        nbytes("q7[3]")


@pytest.mark.parametrize(
    ("entry", "hbm", "host"),
    [
        (f"  %a = {BIG} parameter(0)\n  ROOT %x = {BIG} negate(%a)", 256 * KIB, 0),
        (f"  %a = {BIG} parameter(0)\n  ROOT %x = f32[256,128]{VMEM} copy(%a)", 128 * KIB, 0),
        (
            f"  %a = {BIG} parameter(0)\n"
            f"  %x = (f32[256,128]{VMEM}, {BIG}, u32[]{{:S(2)}}) copy-start(%a)",
            128 * KIB,
            0,
        ),
        (
            f"  %a = {BIG} parameter(0)\n"
            f"  %x = (f32[256,128]{HOST}, {BIG}, u32[]{{:S(2)}}) copy-start(%a)",
            128 * KIB,
            128 * KIB,
        ),
        (
            f"  %a = {BIG} parameter(0)\n"
            f"  %x = (({BIG}), f32[64,128]{VMEM}, s32[]{{:S(2)}}) slice-start(%a)",
            32 * KIB,
            0,
        ),
        (  # an offloaded tensor goes to its place in the host's stack of layers, and comes back
            f"  %a = f32[256,128]{HOST} parameter(0)\n  %u = f32[8,128]{HBM} parameter(1)\n"
            f"  %i = s32[]{{:S(2)}} parameter(2)\n"
            f"  %x = ((f32[256,128]{HOST}, f32[8,128]{HBM}, s32[], s32[]), f32[256,128]{HOST}, "
            f"u32[]{{:S(2)}}) dynamic-update-slice-start(%a, %u, %i, %i)",
            4 * KIB,
            4 * KIB,
        ),
        (
            f"  %a = f32[256,128]{HOST} parameter(0)\n  %i = s32[]{{:S(2)}} parameter(1)\n"
            f"  %x = ((f32[256,128]{HOST}, s32[], s32[]), f32[8,128]{HBM}, u32[]{{:S(2)}}) "
            f"dynamic-slice-start(%a, %i, %i)",
            4 * KIB,
            4 * KIB,
        ),
        (f"  %a = {BIG} parameter(0)\n  ROOT %x = f32[1]{{0}} slice(%a), slice={{[0:1]}}", 8, 0),
        (
            f"  %a = {BIG} parameter(0)\n  %u = f32[8,128]{HBM} parameter(1)\n"
            f"  %i = s32[]{{:S(2)}} parameter(2)\n"
            f"  ROOT %x = {BIG} dynamic-update-slice(%a, %u, %i, %i)",
            2 * 4 * KIB,
            0,
        ),
        (f"  %a = {BIG} parameter(0)\n  ROOT %x = f32[128,256]{HBM} bitcast(%a)", 0, 0),
        (
            f"  %a = {BIG} parameter(0)\n"
            f'  ROOT %x = {BIG} custom-call(%a), custom_call_target="ConcatBitcast"',
            0,
            0,
        ),
        (
            f"  %a = {BIG} parameter(0)\n"
            f"  %x = ({BIG}, f32[1024,128]{HBM}, u32[]{{:S(2)}}) all-gather-start(%a)",
            (128 + 512) * KIB,
            0,
        ),
    ],
)
def test_an_instruction_moves_what_it_reads_and_writes_in_hbm(entry, hbm, host):
    assert moved(entry) == (hbm, host)


LAYER_SLICE = f"""%layer (p: f32[16,256,128], i: s32[]) -> f32[256,128] {{
  %p = f32[16,256,128]{{2,1,0:T(8,128)}} parameter(0)
  %i = s32[]{{:T(128)}} parameter(1)
  %z = s32[]{{:T(128)}} constant(0)
  %c = bf16[16,256,128]{{2,1,0:T(8,128)}} convert(%p)
  %s = bf16[1,256,128]{{2,1,0:T(8,128)}} dynamic-slice(%c, %i, %z, %z)
  ROOT %b = bf16[256,128]{HBM} bitcast(%s)
}}"""


def test_a_fusion_that_slices_its_operand_reads_the_slice():
    entry = f"""  %w = f32[16,256,128]{{2,1,0:T(8,128)}} parameter(0)
  %k = s32[]{{:T(128)S(6)}} parameter(1)
  ROOT %x = bf16[256,128]{VMEM} fusion(%w, %k), kind=kLoop, calls=%layer"""
    assert moved(entry, LAYER_SLICE) == (128 * KIB, 0)


def test_a_fusion_in_a_fusion_reads_what_the_inner_one_slices():
    outer = f"""%outer (w: f32[16,256,128], k: s32[]) -> bf16[256,128] {{
  %w.1 = f32[16,256,128]{{2,1,0:T(8,128)}} parameter(0)
  %k.1 = s32[]{{:T(128)}} parameter(1)
  %inner = bf16[256,128]{HBM} fusion(%w.1, %k.1), kind=kLoop, calls=%layer
  ROOT %n = bf16[256,128]{HBM} negate(%inner)
}}"""
    entry = f"""  %w = f32[16,256,128]{{2,1,0:T(8,128)}} parameter(0)
  %k = s32[]{{:T(128)S(6)}} parameter(1)
  ROOT %x = bf16[256,128]{HBM} fusion(%w, %k), kind=kLoop, calls=%outer"""
    assert moved(entry, LAYER_SLICE, outer) == ((128 + 64) * KIB, 0)


def test_an_update_in_place_moves_the_update_and_a_handed_on_result_nothing():
    body = f"""%update (p: f32[16,256,128], u: f32[256,128], i: s32[]) -> (f32[1], f32[1]) {{
  %p = f32[16,256,128]{{2,1,0:T(8,128)}} parameter(0)
  %u = {BIG} parameter(1)
  %i = s32[]{{:T(128)}} parameter(2)
  %z = s32[]{{:T(128)}} constant(0)
  %b = f32[1,256,128]{{2,1,0:T(8,128)}} bitcast(%u)
  %d = f32[16,256,128]{{2,1,0:T(8,128)}} dynamic-update-slice(%p, %b, %i, %z, %z)
  ROOT %t = (f32[16,256,128]{{2,1,0:T(8,128)}}, {BIG}) tuple(%d, %u)
}}"""
    entry = f"""  %w = f32[16,256,128]{{2,1,0:T(8,128)}} parameter(0)
  %v = {BIG} parameter(1)
  %k = s32[]{{:T(128)S(6)}} parameter(2)
  %x = (f32[16,256,128]{{2,1,0:T(8,128)}}, {BIG}) fusion(%w, %v, %k), kind=kLoop, calls=%update"""
    assert moved(entry, body) == (2 * 128 * KIB, 0)


def test_a_scan_reads_each_layers_weights_and_writes_each_layers_result_once():
    def layers(x, w):
        return lax.scan(lambda c, w: (c + 1, c * w), x, w)

    size = 2048 * 8192 * 4
    x, w = (on_one(*shape, dtype=jnp.float32) for shape in ((2048, 8192), (4, 2048, 8192)))
    found = analysis(compiled(layers, x, w).as_text())
    # The carry, 64 MiB, goes to VMEM before the loop and back after it; a layer reads its weights
    # and writes its result.
    assert found.hbm_traffic_bytes == pytest.approx((2 + 4 * 2) * size, rel=1e-4)
    assert found.executed_flops == 0


def test_copies_to_the_host_stand_apart():
    def offload(x, m):
        near = jax.device_put(m, x_place)
        return x + near, jax.device_put(near * 2, m_place)

    x = on_one(1024, 1024, dtype=jnp.float32)
    m = on_one(1024, 1024, dtype=jnp.float32, memory_kind="pinned_host")
    x_place, m_place = x.sharding, m.sharding
    program = compiled(offload, x, m, out_shardings=(x_place, m_place))
    assert analysis(program.as_text()).host_traffic_bytes == 2 * 4 * 2**20
