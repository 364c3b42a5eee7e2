"""Both backends against attention written as loops in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.kernels.attention import BACKENDS, attention
from llama_jax.kernels.blockwise import blockwise_attention
from llama_jax.kernels.masks import place_in_row
from llama_jax.kernels.reference import reference_attention

F32 = 2e-6  # absolute, values and gradients of order 1


def oracle(q_BTNH, k_BSKH, v_BSKH, ids_BT):
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    out = np.zeros_like(q)
    B, T, N, H = q.shape
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(t + 1) if ids_BT[b, t] and ids_BT[b, s] == ids_BT[b, t]]
        if seen:
            kv = n // (N // k.shape[2])
            scores = k[b, seen, kv] @ q[b, t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, seen, kv] / weights.sum()
    return out


def case(B, T, N, K, H, *, seed=0, dtype=np.float32):
    """Random q, k, v and packed rows: segments of random lengths, the last part padding."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, n, H)).astype(dtype) for n in (N, K, K))
    ids_BT = np.zeros((B, T), np.int32)
    for row in ids_BT:
        cuts = np.sort(rng.integers(0, T + 1, 3))
        row[: cuts[2]] = 1 + (np.arange(cuts[2])[:, None] >= cuts[None, :2]).sum(1)
    return q, k, v, ids_BT


def call(backend, q, k, v, ids_BT, **options):
    return backend(
        jnp.asarray(q),
        jnp.asarray(k),
        jnp.asarray(v),
        q_segment_ids_BT=jnp.asarray(ids_BT),
        kv_segment_ids_BS=jnp.asarray(ids_BT),
        **{"q_order_BT": None, **options},
    )


def blocks_of(size):
    def blockwise(*args, **kwargs):
        return blockwise_attention(*args, block=size, **kwargs)

    return blockwise


SHAPES = [
    # B, T, N, K, H, block
    (2, 16, 4, 2, 8, 4),
    (1, 17, 4, 4, 8, 4),  # not a multiple of the block
    (3, 5, 6, 1, 4, 16),  # block longer than the row
    (2, 33, 3, 3, 16, 32),
    (1, 1, 2, 1, 8, 4),
    (2, 24, 8, 2, 6, 8),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_backend_equals_the_loops(shape):
    *sizes, block = shape
    inputs = case(*sizes)
    wanted = oracle(*inputs)
    np.testing.assert_allclose(call(reference_attention, *inputs), wanted, atol=F32)
    np.testing.assert_allclose(call(blocks_of(block), *inputs), wanted, atol=F32)


@pytest.mark.parametrize("in_order", [True, False])
def test_blocks_of_other_segments_are_not_even_computed(in_order):
    q, k, v, ids_BT = case(2, 32, 4, 2, 8)
    ids_BT[:] = np.repeat([1, 2, 2, 0], 8)
    # Weights of 0 times NaN would be NaN: what is masked only would be seen.
    v[:, :8] = v[:, 24:] = np.nan
    order_BT = None if in_order else place_in_row(jnp.asarray(ids_BT))

    def out(q, k, v):
        return call(blocks_of(8), q, k, v, ids_BT, q_order_BT=order_BT)[:, 8:24]

    grads = jax.grad(lambda *qkv: out(*qkv).sum(), (0, 1, 2))(*map(jnp.asarray, (q, k, v)))
    wanted = oracle(q, k, v, ids_BT)[:, 8:24]
    np.testing.assert_allclose(out(q, k, v), wanted, atol=F32)
    assert all(np.isfinite(grad[:, 8:24]).all() for grad in grads)


@pytest.mark.parametrize("shape", SHAPES)
def test_backends_have_the_same_gradients(shape):
    *sizes, block = shape
    q, k, v, ids_BT = case(*sizes, seed=1)
    pull = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)

    def loss(backend):
        return lambda q, k, v: (call(backend, q, k, v, ids_BT) * pull).sum()

    wanted = jax.grad(loss(reference_attention), (0, 1, 2))(q, k, v)
    got = jax.grad(loss(blocks_of(block)), (0, 1, 2))(q, k, v)
    for name, a, b in zip("qkv", got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2 * F32, err_msg=name)


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_queries_from_further_down_the_row_see_all_keys_before_them(name):
    q, k, v, ids_BT = case(2, 24, 4, 2, 8)
    backend = blocks_of(8) if name == "blockwise" else BACKENDS[name]
    got = backend(
        *(jnp.asarray(x) for x in (q[:, 10:20], k, v)),
        q_segment_ids_BT=jnp.asarray(ids_BT[:, 10:20]),
        kv_segment_ids_BS=jnp.asarray(ids_BT),
        q_order_BT=10 + place_in_row(jnp.asarray(ids_BT[:, 10:20])),
    )
    np.testing.assert_allclose(got, oracle(q, k, v, ids_BT)[:, 10:20], atol=F32)


def test_reference_gradients_equal_finite_differences():
    q, k, v, ids_BT = case(1, 6, 2, 1, 4, seed=3)
    pull = np.random.default_rng(4).normal(size=q.shape)
    grads = jax.grad(
        lambda q, k, v: (call(reference_attention, q, k, v, ids_BT) * pull).sum(), (0, 1, 2)
    )(q, k, v)
    inputs = [x.astype(np.float64) for x in (q, k, v)]
    for i, grad in enumerate(grads):
        numeric = np.zeros(inputs[i].shape)
        for place in np.ndindex(numeric.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in inputs]
                moved[i][place] += step
                ends.append((oracle(*moved, ids_BT) * pull).sum())
            numeric[place] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(grad, numeric, atol=2e-5)


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_rows_that_see_nothing_give_zero_and_no_nan_in_gradients(name):
    q, k, v, _ = case(2, 12, 4, 2, 8)
    ids_BT = np.ones((2, 12), np.int32)
    ids_BT[0, 7:] = 0
    ids_BT[1] = 0

    def loss(q, k, v):
        out = call(BACKENDS[name], q, k, v, ids_BT)
        return (out**2).sum(), out

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    assert np.all(out[0, 7:] == 0.0)
    assert np.all(out[1] == 0.0)
    assert np.all(np.any(out[0, :7] != 0.0, axis=-1))
    for grad in grads:
        assert np.all(np.isfinite(grad))
        assert np.all(grad[0, 7:] == 0.0)
        assert np.all(grad[1] == 0.0)


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_what_is_masked_changes_nothing_however_large(name):
    q, k, v, _ = case(1, 10, 2, 1, 8)
    ids_BT = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0]], np.int32)
    plain = call(BACKENDS[name], q, k, v, ids_BT)
    for x in (k, v):
        x[:, :4] = 1e10  # another segment, earlier
        x[:, 7:] = -1e10  # padding
        x[:, 6] = 1e10  # the future of 4 and 5
    changed = call(BACKENDS[name], q, k, v, ids_BT)
    np.testing.assert_array_equal(changed[:, 4:6], plain[:, 4:6])


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_bfloat16_inputs_give_bfloat16_with_float32_softmax(name):
    q, k, v, ids_BT = case(2, 64, 4, 2, 16)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = call(BACKENDS[name], *low, ids_BT)
    assert out.dtype == jnp.bfloat16
    wanted = oracle(*(np.asarray(x, np.float32) for x in low), ids_BT)
    # Weights and output are rounded to 8 bits once each; scores kept in bfloat16 would give
    # errors about ten times as large.
    assert np.abs(np.asarray(out, np.float32) - wanted).max() < 0.02
    assert np.abs(np.asarray(out, np.float32) - wanted).mean() < 0.001


def test_blockwise_memory_grows_with_the_length_not_with_its_square():
    def temporary_bytes(backend, T):
        def loss(q, k, v, ids_BT):
            return call(backend, q, k, v, ids_BT).sum()

        x = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
        ids_BT = jax.ShapeDtypeStruct((1, T), jnp.int32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, ids_BT).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = (temporary_bytes(blocks_of(128), T) for T in (1024, 4096))
    assert long < 4.5 * short
    assert temporary_bytes(reference_attention, 4096) > 5 * long


def test_attention_runs_the_backend_that_it_is_told(monkeypatch):
    q, k, v, ids_BT = case(1, 8, 2, 1, 4)
    monkeypatch.setitem(BACKENDS, "blockwise", lambda q, *_, **__: q + 1)
    ids = {"q_segment_ids_BT": ids_BT, "kv_segment_ids_BS": ids_BT}
    np.testing.assert_array_equal(attention(q, k, v, **ids, backend="blockwise"), q + 1)
