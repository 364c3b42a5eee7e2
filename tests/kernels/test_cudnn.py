"""What surrounds cuDNN's kernel, by XLA's form of the same function; the kernel needs a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.kernels.cudnn import bias_bytes, cudnn_attention, unsupported
from llama_jax.kernels.masks import place_in_row
from llama_jax.kernels.reference import reference_attention

F32 = 4e-6


@pytest.mark.parametrize("first", [None, 4], ids=["rows in order", "queries from further down"])
def test_segments_padding_and_order_reach_the_kernel(monkeypatch, first):
    called = []

    def xla(*args, implementation, **kwargs):
        called.append(implementation)
        return plain(*args, implementation="xla", **kwargs)

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 24, n, 8)), jnp.float32) for n in (4, 2, 2))
    ids_BT = jnp.asarray([[1] * 9 + [2] * 10 + [0] * 5, [0] * 24], jnp.int32)
    queries = slice(first, None)
    order_BT = None if first is None else first + place_in_row(ids_BT[:, queries])

    def values(backend):
        def loss(q, k, v):
            ids = {"q_segment_ids_BT": ids_BT[:, queries], "kv_segment_ids_BS": ids_BT}
            out = backend(q[:, queries], k, v, **ids, q_order_BT=order_BT)
            return (out**2).sum(), out

        grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    for got, wanted in zip(values(cudnn_attention), values(reference_attention), strict=True):
        np.testing.assert_allclose(got, wanted, atol=F32)
        assert np.all(np.asarray(got)[1] == 0.0)
    assert called == ["cudnn"]


def test_what_the_kernel_cannot_take_is_said():
    ask = functools.partial(unsupported, "bfloat16", 128)
    assert ask(8192, 8192) is None
    assert ask(8192, 4097) == "a length of 4097 is odd"
    assert (
        unsupported("float32", 128, 64, 64) == "its operands are bfloat16 or float16, not float32"
    )
    assert unsupported("bfloat16", 100, 64, 64) == "head dim 100 is no multiple of 8 up to 128"
    assert bias_bytes(2, 8192, 8192, 2) == 2**28
