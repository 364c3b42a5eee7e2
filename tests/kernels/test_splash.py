"""The TPU kernel run by Pallas' interpreter against `reference`, and its block sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.hardware import CHIPS, GIB
from llama_jax.config.run import MeshConfig
from llama_jax.kernels import splash
from llama_jax.kernels.attention import attention
from llama_jax.kernels.blocks import Blocks, backward_plan, blocks_for, fitting
from llama_jax.kernels.masks import place_in_row
from llama_jax.kernels.reference import reference_attention
from llama_jax.sharding.mesh import make_mesh

F32 = 1e-5  # absolute, values and gradients of order 1
SMALL = Blocks(128, 256, 128, 128, 256, 128)
TINY = Blocks(128, 128, 128, 128, 128, 128)
SPLIT = dataclasses.replace(TINY, fused=False)


def case(B, T, N, K, H):
    """Packed rows: the first of one document and no padding, others of three and some padding."""
    rng = np.random.default_rng(B * T + N)
    q, k, v, pull = (jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K, N))
    ids_BT = np.ones((B, T), np.int32)
    for row in ids_BT[1:]:
        cuts = np.sort(rng.integers(1, T, 3))
        row[:] = (1 + (np.arange(T)[:, None] >= cuts[None, :2]).sum(1)) * (np.arange(T) < cuts[2])
    return q, k, v, pull, jnp.asarray(ids_BT)


def values(backend, q, k, v, pull, q_ids_BT, kv_ids_BS, order_BT=None):
    """The output and the gradients of q, k and v."""

    def out_of(q, k, v):
        ids = {"q_segment_ids_BT": q_ids_BT, "kv_segment_ids_BS": kv_ids_BS}
        return backend(q, k, v, **ids, q_order_BT=order_BT)

    @jax.jit
    def both(q, k, v):
        out, back = jax.vjp(out_of, q, k, v)
        return out, *back(pull)

    return both(q, k, v)


def interpreted(blocks):
    return functools.partial(
        splash.splash_attention, device_kind="cpu", interpret=True, blocks=blocks
    )


def check(got, wanted):
    for name, a, b in zip(("out", "q", "k", "v"), got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=F32, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ((2, 256, 4, 2, 64), SMALL),  # grouped queries, small heads
        ((2, 200, 2, 2, 128), SMALL),  # a head of keys each; no multiple of a block
        ((1, 384, 2, 1, 128), SMALL),  # one head of keys for all
        ((2, 130, 4, 2, 64), SPLIT),  # two backward kernels
    ],
    ids=str,
)
def test_the_kernel_equals_the_reference_in_values_and_gradients(sizes, blocks):
    *arrays, ids_BT = case(*sizes)
    got = values(interpreted(blocks), *arrays, ids_BT, ids_BT)
    check(got, values(reference_attention, *arrays, ids_BT, ids_BT))
    padded = np.asarray(ids_BT) == 0
    for x in got:
        assert np.all(np.isfinite(x))
        assert np.all(np.asarray(x)[padded] == 0.0)


def test_queries_of_two_chunks_see_what_is_before_each_of_them():
    q, k, v, pull, ids_BT = case(2, 256, 2, 1, 64)
    # The first of two shards in zigzag order: chunks 0 and 3 of four.
    places = np.r_[0:64, 192:256]
    order_BT = jnp.broadcast_to(jnp.asarray(places, jnp.int32), (2, 128))
    arrays = (q[:, places], k, v, pull[:, places], ids_BT[:, places], ids_BT, order_BT)
    # The order as a value that isn't known when tracing: each device of a mesh has its own.
    got = jax.jit(functools.partial(values, interpreted(TINY)))(*arrays)
    check(got, values(reference_attention, *arrays))


def test_a_shard_whose_last_query_sees_half_of_the_keys_gives_the_rest_no_gradient():
    q, k, v, pull, ids_BT = case(1, 256, 2, 1, 64)
    first = slice(0, 128)
    arrays = (q[:, first], k, v, pull[:, first], ids_BT[:, first], ids_BT)
    order_BT = place_in_row(ids_BT[:, first])
    got = values(interpreted(TINY), *arrays, order_BT)
    check(got, values(reference_attention, *arrays, order_BT))
    assert np.all(np.asarray(got[2])[:, 128:] == 0.0)


@pytest.mark.short
def test_heads_taken_some_at_a_time_give_the_same(monkeypatch):
    *arrays, ids_BT = case(1, 128, 4, 2, 64)
    monkeypatch.setattr(splash, "backward_plan", lambda kind, blocks, *_: (blocks, 1))
    got = values(interpreted(TINY), *arrays, ids_BT, ids_BT)
    check(got, values(reference_attention, *arrays, ids_BT, ids_BT))


def test_on_a_mesh_it_equals_one_device():
    q, k, v, pull, ids_BT = case(4, 128, 4, 2, 64)
    wanted = values(reference_attention, q, k, v, pull, ids_BT, ids_BT)

    def backend(q, k, v, *, q_order_BT, **ids):
        return attention(q, k, v, **ids, backend="splash", interpret=True)

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
        check(values(backend, q, k, v, pull, ids_BT, ids_BT), wanted)


@pytest.mark.short
def test_blocks_are_cut_to_rows_that_are_shorter_or_no_multiple():
    kind = CHIPS["v5e"].device_kind
    assert blocks_for(kind, 128, 8192, 8192) == Blocks(1024, 1024, 512, 1024, 1024, 512)
    assert blocks_for(kind, 64, 8192, 8192) == blocks_for(kind, 128, 8192, 8192)
    assert blocks_for(kind, 128, 256, 256) == Blocks(256, 256, 256, 256, 256, 256)
    assert fitting(1024, 1000) == 1024
    assert fitting(1024, 1100) == 128  # a block of 256 would fill up a sixth
    assert fitting(1024, 5000) == 1024
    assert blocks_for("another chip", 128, 8192, 8192).q == 512


def test_partial_gradients_of_queries_are_held_for_as_many_heads_as_memory_allows():
    kind = CHIPS["v5e"].device_kind  # 15.75 GiB: 672 MiB for them
    row = blocks_for(kind, 128, 8192, 8192)

    def plan(heads, one_head_mib, kind=kind):
        blocks, at_once = backward_plan(kind, row, heads, one_head_mib * GIB // 2**10 // 8, 8192)
        return at_once if blocks.fused else "two kernels"

    assert plan(8, 64) == 8  # Llama 3.1 8B, a row of 8192 tokens
    assert plan(8, 128) == 4
    assert plan(6, 256) == 2
    assert plan(8, 600) == 1
    assert plan(8, 700) == "two kernels"
    assert plan(8, 700, kind="cpu") == 8


def test_long_rows_take_more_keys_a_block_backward():
    kind = CHIPS["v5p"].device_kind
    assert blocks_for(kind, 128, 8192, 131072) == Blocks(1024, 1024, 512, 1024, 2048, 512)
    # Both paddings must serve both passes.
    for length in (100, 1100, 3000, 33000, 131072):
        row = blocks_for(kind, 128, length, length)
        assert max(row.kv, row.kv_back) % min(row.kv, row.kv_back) == 0
        assert row.kv % row.kv_compute == row.kv_back % row.kv_back_compute == 0
