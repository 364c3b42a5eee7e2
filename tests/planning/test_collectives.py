"""Collectives by kind, axis, bytes and form: in compiled programs, and in texts of rarer forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from tpu_programs import analysis, compiled, devices, module, on_mesh

from llama_jax.planning.collectives import Layout, merge
from llama_jax.planning.program_text import ProgramError

LAYERS, D, F = 3, 256, 512
WEIGHT = D * F * 2  # bytes, gathered in bfloat16


def mesh_of(topology, shape, axes, num_slices=1):
    kinds = (AxisType.Auto,) * len(axes)
    found = np.asarray(devices(topology, num_slices)).reshape(shape)
    return Mesh(found, axes, axis_types=kinds)


def step(mesh):
    """Gradients of a scanned two-layer MLP, weights sharded over the last axis and gathered."""
    axis = mesh.axis_names[-1]

    def layer(x, w):
        def local(x, a, b):
            a, b = (
                lax.all_gather(each.astype(jnp.bfloat16), axis, axis=0, tiled=True)
                for each in (a, b)
            )
            return x + jnp.sin(x @ a) @ b

        specs = (P(mesh.axis_names, None), P(axis, None), P(axis, None))
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0])
        return mapped(x, *w), None

    def loss(w, x):
        return lax.scan(jax.checkpoint(layer), x, w)[0].astype(jnp.float32).sum()

    weights = tuple(
        on_mesh(mesh, (LAYERS, *shape), (None, axis, None), jnp.float32)
        for shape in ((D, F), (F, D))
    )
    x = on_mesh(mesh, (mesh.size * 128, D), (mesh.axis_names, None))
    shardings = tuple(each.sharding for each in weights)
    return compiled(jax.grad(loss), weights, x, out_shardings=shardings).as_text()


def totals(found):
    """Count and bytes by kind and axis, over all forms."""
    sums = {}
    for each in found.collectives:
        count, size = sums.get((each.kind, each.axis), (0, 0))
        sums[each.kind, each.axis] = count + each.count, size + each.bytes
    return sums


def test_fsdp_gathers_each_weight_forward_and_backward_and_reduces_each_gradient():
    mesh = mesh_of("v5e:2x2", (1, 4), ("data", "fsdp"))
    found = analysis(step(mesh), layout=Layout.of(mesh))
    sums = totals(found)
    assert sums["all-gather", "fsdp"] == (2 * 2 * LAYERS, 2 * 2 * LAYERS * WEIGHT)
    reduced = [sums.get((kind, "fsdp"), (0, 0))[1] for kind in ("reduce-scatter", "all-reduce")]
    assert sum(reduced) == 2 * LAYERS * WEIGHT
    # Forward, forward again but for the last product, and twice that backward: 7 of 8.
    assert found.dot_flops == LAYERS * 7 * 2 * 128 * D * F


def test_a_group_is_named_by_the_axes_it_runs_along():
    mesh = mesh_of("v5e:2x2", (2, 2), ("data", "fsdp"))
    found = analysis(step(mesh), layout=Layout.of(mesh))
    assert ("all-gather", "fsdp") in totals(found)
    over_data = [each for each in found.collectives if "data" in each.axis]
    assert over_data
    assert {each.torus for each in found.collectives if each.axis == "fsdp"} == {((0, 2),)}


def test_what_goes_between_slices_is_found_in_the_runtimes_sends():
    mesh = mesh_of("v5e:2x2", (2, 4), ("data", "fsdp"), num_slices=2)
    found = analysis(step(mesh), layout=Layout.of(mesh))
    across = [each for each in found.collectives if each.num_slices == 2]
    assert {(each.kind, each.axis, each.overlapped) for each in across} == {
        ("all-reduce", "data", True)
    }
    # Each device sends the quarter of the gradients that it holds.
    assert sum(each.bytes for each in across) == 2 * LAYERS * WEIGHT // 4


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "fsdp+tensor"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("[4,2]<=[8]", "tensor"),
        ("[4,2]<=[2,2,2]T(0,2,1)", "fsdp"),
        ("[2,4]<=[4,2]T(1,0)", "data+fsdp"),
        ("mesh['a'=2,'b'=2,'c'=2] {'b'}", "fsdp"),
        ("mesh['a'=2,'b'=4] {'b'}", "fsdp+tensor"),
        ("mesh['a'=8] {'a':(2)2}", "fsdp"),
        ("mesh['a'=2,'b'=4] device_ids=([4,2]<=[4,2]T(1,0)) {'a'}", "tensor"),
        ("{}", "data+fsdp+tensor"),
    ],
)
def test_each_way_of_writing_groups_is_understood(groups, axis):
    text = module(
        f"""ENTRY %main (a: f32[8]) -> f32[64] {{
  %a = f32[8]{{0:T(128)}} parameter(0)
  ROOT %g = f32[64]{{0:T(128)}} all-gather(%a), replica_groups={groups}, dimensions={{0}}
}}"""
    )
    layout = Layout({"data": 2, "fsdp": 2, "tensor": 2})
    (found,) = analysis(text, layout=layout).collectives
    assert (found.axis, found.bytes, found.form) == (axis, 256, "sync")


def test_groups_that_cannot_be_read_are_an_error():
    text = module(
        """ENTRY %main (a: f32[8]) -> f32[64] {
  %a = f32[8]{0} parameter(0)
  ROOT %g = f32[64]{0} all-gather(%a), channel_id=1, replica_groups=new_form(3), dimensions={0}
}"""
    )
    with pytest.raises(ProgramError, match="g: its replica_groups can't be read"):
        analysis(text)


def test_a_permutes_axis_is_read_from_its_pairs_and_its_bytes_are_of_one_hop():
    text = module(
        """ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %s = (f32[8]{0:T(128)}, f32[8]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=1, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  ROOT %d = f32[8]{0:T(128)} collective-permute-done(%s)
}"""  # noqa: E501
    )
    (found,) = analysis(text, layout=Layout({"context": 2, "tensor": 2})).collectives
    assert (found.kind, found.axis, found.bytes) == ("collective-permute", "context", 32)
    assert (found.form, found.overlapped) == ("start/done", True)


# What the compiler writes for a v5e: the gather starts in one fusion, goes on in others beside
# their own work, and ends in a last one.
FUSED_GATHER = (
    """%start (p: bf16[64,128]) -> bf16[256,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  %g = bf16[256,128]{1,0} all-gather(%p), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = (bf16[64,128]{1,0}, bf16[256,128]{1,0}, s32[2]{0:S(4)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}""",  # noqa: E501
    """%beside (q: bf16[64,128], o: bf16[256,128], x: f32[8,128]) -> (f32[8,128], bf16[64,128]) {
  %q = bf16[64,128]{1,0} parameter(0)
  %o = bf16[256,128]{1,0} parameter(1)
  %x = f32[8,128]{1,0} parameter(2)
  %n = f32[8,128]{1,0} negate(%x)
  %h = bf16[256,128]{1,0} all-gather(%q), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %t = (f32[8,128]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) tuple(%n, %q, %h)
}""",
    """%end (r: bf16[64,128], w: bf16[256,128]) -> bf16[256,128] {
  %r = bf16[64,128]{1,0} parameter(0)
  %w = bf16[256,128]{1,0} parameter(1)
  %k = bf16[256,128]{1,0} all-gather(%r), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %e = bf16[256,128]{1,0} custom-call(%r, %w, %k), custom_call_target="AsyncCollectiveDone"
}""",
    """ENTRY %main (a: bf16[64,128], b: f32[8,128]) -> bf16[256,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %b = f32[8,128]{1,0} parameter(1)
  %s = (bf16[64,128]{1,0}, bf16[256,128]{1,0}, s32[2]{0:S(4)}) fusion(%a), kind=kCustom, calls=%start
  %s0 = bf16[64,128]{1,0} get-tuple-element(%s), index=0
  %s1 = bf16[256,128]{1,0} get-tuple-element(%s), index=1
  %m = (f32[8,128]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) fusion(%s0, %s1, %b), kind=kLoop, calls=%beside
  %m1 = bf16[64,128]{1,0} get-tuple-element(%m), index=1
  %m2 = bf16[256,128]{1,0} get-tuple-element(%m), index=2
  ROOT %d = bf16[256,128]{1,0} fusion(%m1, %m2), kind=kCustom, calls=%end
}""",  # noqa: E501
)


def test_a_gather_spread_over_fusions_counts_once_in_calls_and_bytes():
    found = analysis(module(*FUSED_GATHER), layout=Layout({"fsdp": 4}))
    (gather,) = found.collectives
    assert (gather.count, gather.bytes) == (1, 256 * 128 * 2)
    assert (gather.form, gather.overlapped) == ("async-collective-fusion", True)
    # The shard read, the whole written, and what the fusion in the middle does beside it.
    assert found.hbm_traffic_bytes == (64 + 256) * 128 * 2 + 2 * 8 * 128 * 4


SPARSECORE = """%called (p: bf16[64,128]) -> bf16[256,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %g = bf16[256,128]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%async (q: bf16[64,128]) -> bf16[256,128] {
  %q = bf16[64,128]{1,0} parameter(0)
  ROOT %c = bf16[256,128]{1,0} custom-call(%q), called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[64,128]) -> bf16[256,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %s = ((), (), (s32[8192]{0:T(1024)})) async-start(), calls=%async
  %u = ((bf16[64,128]{1,0}), bf16[256,128]{1,0}, (s32[8192]{0})) async-update(%s, %a)
  ROOT %d = bf16[256,128]{1,0} async-done(%u)
}"""


def test_a_gather_on_the_sparsecore_is_overlapped():
    (found,) = analysis(module(SPARSECORE), layout=Layout({"fsdp": 4})).collectives
    assert (found.kind, found.count, found.bytes) == ("all-gather", 1, 256 * 128 * 2)
    assert (found.form, found.overlapped) == ("sparsecore", True)


FUSED_SCATTER = """%all-reduce-scatter (input: bf16[1024,4096]) -> bf16[288,4096] {
  %input = bf16[1024,4096]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  %pad = bf16[1152,4096]{1,0} pad(%input, %zero), padding=0_128x0_0
  %sum = bf16[1152,4096]{1,0} all-reduce(%pad), replica_groups={{0,1,2,3}}, to_apply=%add
  %id = u32[] partition-id()
  %i = u32[] constant(0)
  ROOT %mine = bf16[288,4096]{1,0} dynamic-slice(%sum, %id, %i), dynamic_slice_sizes={288,4096}
}

ENTRY %main (a: bf16[1024,4096]) -> bf16[288,4096] {
  %a = bf16[1024,4096]{1,0} parameter(0)
  ROOT %f = bf16[288,4096]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}"""


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    found = analysis(module(FUSED_SCATTER), layout=Layout({"fsdp": 4}))
    (scatter,) = found.collectives
    # Bytes of the input, without what it is padded with.
    assert (scatter.kind, scatter.bytes) == ("reduce-scatter", 1024 * 4096 * 2)
    assert (scatter.form, scatter.overlapped) == ("sync-fused-rs", False)
    assert found.hbm_traffic_bytes == (1024 + 288) * 4096 * 2


def test_collectives_that_differ_in_form_stay_apart_when_added_up():
    (gather,) = analysis(module(*FUSED_GATHER), layout=Layout({"fsdp": 4})).collectives
    (sparse,) = analysis(module(SPARSECORE), layout=Layout({"fsdp": 4})).collectives
    merged = merge([gather.times(3), sparse, gather])
    assert [(each.form, each.count) for each in merged] == [
        ("async-collective-fusion", 4),
        ("sparsecore", 1),
    ]
