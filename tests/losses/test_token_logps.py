"""Chunked log-probabilities against the plain form, the cross entropy, shards and memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llama_jax.losses.cross_entropy import chunked_cross_entropy
from llama_jax.losses.token_logps import token_logps

# Relative to the largest value of the array: chunks only change the order of float32 sums.
RTOL = {"float32": 1e-5, "bfloat16": 1e-2}
AXES = ("data", "fsdp", "context", "tensor")
TOKENS = P(("data", "fsdp"), "context")
B, T, D, V = 8, 8, 16, 64


def plain(x_BTD, head_DV, targets_BT):
    logits_BTV = jnp.einsum("BTD,DV->BTV", *(a.astype(jnp.float32) for a in (x_BTD, head_DV)))
    logps_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    return jnp.take_along_axis(logps_BTV, targets_BT[..., None], axis=-1)[..., 0]


def example(logit_scale=1.0, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    head_DV = (jax.random.normal(keys[1], (D, V)) * logit_scale / math.sqrt(D)).astype(dtype)
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    cotangent_BT = jax.random.normal(keys[3], (B, T))
    return (x_BTD, head_DV, targets_BT), cotangent_BT


def value_and_gradients(function, arrays, cotangent_BT):
    """Log-probabilities, and gradients of x and head, for a given cotangent a token."""

    def run(x_BTD, head_DV, targets_BT, cotangent_BT):
        logps_BT, transpose = jax.vjp(lambda x, head: function(x, head, targets_BT), x_BTD, head_DV)
        return logps_BT, *transpose(cotangent_BT)

    return jax.jit(run)(*arrays, cotangent_BT)


def assert_near(actual, expected, rtol):
    actual, expected = (np.asarray(a, np.float32) for a in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize(("chunk_size", "logit_scale"), [(7, 1.0), (1000, 1.0), (7, 100.0)])
def test_values_and_gradients_are_the_plain_forms(chunk_size, logit_scale):
    arrays, cotangent_BT = example(logit_scale)
    function = functools.partial(token_logps, chunk_size=chunk_size)
    for actual, expected in zip(
        value_and_gradients(function, arrays, cotangent_BT),
        value_and_gradients(plain, arrays, cotangent_BT),
        strict=True,
    ):
        assert_near(actual, expected, RTOL["float32"])


def test_bfloat16_inputs_give_float32_values_of_their_exact_values():
    arrays, cotangent_BT = example(dtype="bfloat16")
    function = functools.partial(token_logps, chunk_size=7)
    logps_BT, *grads = value_and_gradients(function, arrays, cotangent_BT)
    expected_BT, *expected_grads = value_and_gradients(plain, arrays, cotangent_BT)
    assert logps_BT.dtype == jnp.float32
    assert_near(logps_BT, expected_BT, RTOL["float32"])  # not rounded to bfloat16
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.dtype == jnp.bfloat16
        assert_near(grad, expected, RTOL["bfloat16"])


def test_their_weighted_sum_is_the_cross_entropys():
    arrays, weights_BT = example()
    loss, _ = chunked_cross_entropy(*arrays, weights_BT, z_loss=0.0, chunk_size=7)
    logps_BT = token_logps(*arrays, chunk_size=9)
    assert float(-(weights_BT * logps_BT).sum()) == pytest.approx(float(loss), rel=1e-5)


def test_uniform_logits_over_128256_classes_give_minus_the_log_of_128256():
    x_BTD, head_DV = jnp.zeros((1, 2, 8), jnp.bfloat16), jnp.ones((8, 128256), jnp.bfloat16)
    logps_BT = token_logps(x_BTD, head_DV, jnp.array([[5, 9]]), chunk_size=2)
    np.testing.assert_allclose(logps_BT, -11.761784, rtol=0, atol=1e-6)


def test_a_place_whose_result_is_not_used_adds_nothing_whatever_it_holds():
    (x_BTD, head_DV, targets_BT), cotangent_BT = example()
    used_BT = jnp.arange(T) % 3 > 0
    broken_BTD = jnp.where(used_BT[..., None], x_BTD, jnp.nan)

    def loss(x_BTD, head_DV):
        logps_BT = token_logps(x_BTD, head_DV, targets_BT, chunk_size=7)
        return (jnp.where(used_BT, logps_BT, 0.0) * cotangent_BT).sum()

    for one, other in zip(
        jax.tree.leaves(jax.value_and_grad(loss, (0, 1))(x_BTD, head_DV)),
        jax.tree.leaves(jax.value_and_grad(loss, (0, 1))(broken_BTD, head_DV)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


# x as the residual stream lies (its length split over the tensor axis too), the head's columns
# over that axis alone, or over fsdp as well, as on small slices.
@pytest.mark.parametrize("vocab", ["tensor", ("tensor", "fsdp")])
@pytest.mark.parametrize(
    "sizes", [(8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 1, 8), (1, 1, 1, 1)]
)
def test_sharded_is_unsharded_in_values_gradients_and_layout(sizes, vocab):
    arrays, cotangent_BT = example()
    function = functools.partial(token_logps, chunk_size=3)
    expected = value_and_gradients(plain, arrays, cotangent_BT)
    mesh = jax.make_mesh(
        sizes,
        AXES,
        axis_types=(AxisType.Explicit,) * 4,
        devices=jax.devices()[: math.prod(sizes)],
    )
    with jax.set_mesh(mesh):
        specs = (P(("data", "fsdp"), ("context", "tensor"), None), P(None, vocab), TOKENS)
        sharded = tuple(jax.device_put(a, s) for a, s in zip(arrays, specs, strict=True))
        actual = value_and_gradients(function, sharded, jax.device_put(cotangent_BT, TOKENS))
    for array, wanted, like in zip(actual, expected, (sharded[2], *sharded[:2]), strict=True):
        assert_near(array, wanted, RTOL["float32"])
        assert array.sharding.is_equivalent_to(like.sharding, array.ndim)


def test_memory_is_bounded_by_the_chunk_not_by_the_sequence():
    tokens, vocab, chunk = 1024, 16384, 64
    shapes = [((1, tokens, 8), "float32"), ((8, vocab), "float32"), ((1, tokens), "int32")]
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def loss(x_BTD, head_DV, targets_BT):
        return (token_logps(x_BTD, head_DV, targets_BT, chunk_size=chunk) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*abstract).compile()
    logits_bytes = 4 * tokens * vocab
    # A few arrays of a chunk's logits, and the gradients.
    bound = 4 * logits_bytes * chunk / tokens + 4 * 8 * (tokens + 4 * vocab)
    assert compiled.memory_analysis().temp_size_in_bytes <= bound < logits_bytes
