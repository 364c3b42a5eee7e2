"""Attention over a cache against the reference on the same keys, whole and by blocks."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.kernels import cached
from llama_jax.kernels.reference import reference_attention

BACKENDS = {"whole": cached._whole, "blocks": functools.partial(cached._by_blocks, block=16)}


def case(B=3, T=5, S=50, first=29, N=6, K=2, H=8):
    """A cache filled up to `first` + T, with holes, and NaN-free rubbish where nothing is."""
    rng = np.random.default_rng(0)
    q_BTNH = rng.normal(size=(B, T, N, H)).astype(np.float32)
    k_BKSH, v_BKSH = rng.normal(size=(2, B, K, S, H)).astype(np.float32)
    ids_BS = (rng.random((B, S)) < 0.7).astype(np.int32)
    ids_BS[:, first + T :] = 0
    ids_BS[0, :first] = 0  # nothing but the new tokens
    ids_BS[1, first : first + T] = 0  # a finished row
    return q_BTNH, k_BKSH, v_BKSH, ids_BS[:, first : first + T], ids_BS, first


def run(backend, q, k, v, q_ids, kv_ids, first):
    return np.asarray(BACKENDS[backend](q, k, v, q_ids, kv_ids, jnp.int32(first)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [{}, {"T": 1, "first": 49}, {"T": 50, "first": 0}, {"S": 64}])
def test_it_is_the_reference_over_what_is_filled(backend, shape):
    q, k, v, q_ids, kv_ids, first = case(**shape)
    order_BT = np.broadcast_to(first + np.arange(q.shape[1], dtype=np.int32), q_ids.shape)
    wanted = reference_attention(
        jnp.asarray(q),
        jnp.asarray(k.transpose(0, 2, 1, 3)),
        jnp.asarray(v.transpose(0, 2, 1, 3)),
        q_segment_ids_BT=jnp.asarray(q_ids),
        kv_segment_ids_BS=jnp.asarray(kv_ids),
        q_order_BT=jnp.asarray(order_BT),
    )
    got = run(backend, q, k, v, q_ids, kv_ids, first)
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    assert not got[q_ids == 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_holes_and_places_not_yet_filled_can_hold_anything(backend):
    q, k, v, q_ids, kv_ids, first = case()
    wanted = run(backend, q, k, v, q_ids, kv_ids, first)
    hidden_BS = kv_ids == 0
    for x in (k, v):
        x.transpose(0, 2, 1, 3)[hidden_BS] = 1e10
    np.testing.assert_array_equal(run(backend, q, k, v, q_ids, kv_ids, first), wanted)


def test_long_caches_go_by_blocks_and_leave_out_what_is_not_filled():
    S = 4 * cached.WHOLE_UP_TO
    q, k, v, q_ids, kv_ids, first = case(B=2, T=1, S=S, first=700, N=2, K=1)

    def attend(first):
        return cached.cached_attention(
            q, k, v, q_segment_ids_BT=q_ids, kv_segment_ids_BS=kv_ids, first=first
        )

    # Past the filled blocks there may be NaN, which even a weight of 0 would let through.
    wanted = np.asarray(attend(jnp.int32(first)))
    for x in (k, v):
        x[:, :, 2 * cached.BLOCK :] = np.nan
    np.testing.assert_array_equal(attend(jnp.int32(first)), wanted)
