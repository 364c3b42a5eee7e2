"""Chunked cross entropy against the plain form, known values, shards and memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llama_jax.losses.cross_entropy import chunked_cross_entropy

# Relative to the largest value of the array: chunks only change the order of float32 sums.
RTOL = {"float32": 1e-5, "bfloat16": 1e-2}
AXES = ("data", "fsdp", "context", "tensor")
TOKENS = P(("data", "fsdp"), "context")
B, T, D, V = 4, 8, 16, 64


def plain(x_BTD, head_DV, targets_BT, weights_BT, z_loss):
    logits_BTV = jnp.einsum("BTD,DV->BTV", *(a.astype(jnp.float32) for a in (x_BTD, head_DV)))
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return (weights_BT * (log_z_BT - target_BT + z_loss * log_z_BT**2)).sum()


def loss_only(*arrays, z_loss=0.0, chunk_size=7):
    return chunked_cross_entropy(*arrays, z_loss=z_loss, chunk_size=chunk_size)[0]


def example(logit_scale=1.0, dtype="float32", masked=0.3, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    x_BTD = jax.random.normal(keys[0], (B, T, D))
    head_DV = jax.random.normal(keys[1], (D, V)) * logit_scale / math.sqrt(D)
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weights_BT = (jax.random.uniform(keys[3], (B, T)) >= masked).astype(jnp.float32)
    return x_BTD.astype(dtype), head_DV.astype(dtype), targets_BT, weights_BT


def assert_near(actual, expected, rtol):
    actual, expected = (np.asarray(a, np.float32) for a in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("logit_scale", [1.0, 100.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_value_and_gradients_are_the_plain_forms(chunk_size, logit_scale, z_loss):
    arrays = example(logit_scale)
    expected, expected_grads = jax.value_and_grad(plain, (0, 1, 3))(*arrays, z_loss)
    function = functools.partial(loss_only, z_loss=z_loss, chunk_size=chunk_size)
    value, grads = jax.jit(jax.value_and_grad(function, (0, 1, 3)))(*arrays)
    assert_near(value, expected, RTOL["float32"])
    assert_near(jax.jit(function)(*arrays), expected, RTOL["float32"])
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_near(grad, expected_grad, RTOL["float32"])


def test_bfloat16_inputs_give_a_float32_loss_of_their_exact_values():
    arrays = example(dtype="bfloat16")
    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(*arrays, 1e-3)
    function = functools.partial(loss_only, z_loss=1e-3)
    value, grads = jax.value_and_grad(function, (0, 1))(*arrays)
    assert value.dtype == jnp.float32
    assert_near(value, expected, RTOL["float32"])  # the loss itself is not rounded to bfloat16
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == jnp.bfloat16
        assert_near(grad, expected_grad, RTOL["bfloat16"])


def test_uniform_logits_over_128256_classes_cost_the_log_of_128256():
    x_BTD = jnp.zeros((1, 2, 8), jnp.bfloat16)
    head_DV = jnp.ones((8, 128256), jnp.bfloat16)
    loss, sums = chunked_cross_entropy(
        x_BTD, head_DV, jnp.array([[5, 9]]), jnp.ones((1, 2)), z_loss=0.0, chunk_size=2
    )
    assert float(loss) / 2 == pytest.approx(11.761784, abs=1e-6)  # bfloat16 would say 11.75
    assert float(sums["tokens"]) == 2


def test_sums_tell_cross_entropy_and_z_term_apart():
    x_BTD = jnp.zeros((1, 3, 2))
    loss, sums = chunked_cross_entropy(
        x_BTD,
        jnp.ones((2, 4)),
        jnp.array([[0, 1, 2]]),
        jnp.array([[1.0, 1.0, 0.0]]),
        z_loss=0.5,
        chunk_size=2,
    )
    assert float(sums["cross_entropy"]) == pytest.approx(2 * 1.3862944)  # log 4
    assert float(sums["z_loss"]) == pytest.approx(2 * 0.5 * 1.9218121)  # (log 4)^2
    assert float(loss) == pytest.approx(2 * (1.3862944 + 0.5 * 1.9218121))


def test_correct_counts_weights_of_targets_with_the_largest_logit():
    x_BTD = jnp.eye(3)[None]  # token i has logits head[i]
    head_DV = jnp.array([[3.0, 1.0], [0.0, 2.0], [5.0, 1.0]])
    weights_BT = jnp.array([[1.0, 1.0, 0.5]])
    _, sums = chunked_cross_entropy(
        x_BTD, head_DV, jnp.array([[0, 0, 0]]), weights_BT, z_loss=0.0, chunk_size=2
    )
    assert float(sums["correct"]) == 1.5


def test_without_targets_loss_and_gradients_are_exactly_zero():
    x_BTD, head_DV, targets_BT, weights_BT = example(logit_scale=100.0)
    arrays = (1e10 * x_BTD, head_DV, targets_BT, jnp.zeros_like(weights_BT))
    value, grads = jax.value_and_grad(functools.partial(loss_only, z_loss=1e-3), (0, 1))(*arrays)
    assert float(value) == 0.0
    for grad in grads:
        assert (np.asarray(grad) == 0.0).all()


def test_a_masked_tokens_values_change_nothing():
    x_BTD, head_DV, targets_BT, weights_BT = example()
    changed_BTD = jnp.where(weights_BT[..., None] > 0, x_BTD, 1e10)
    function = jax.value_and_grad(loss_only, 1)
    for one, other in zip(
        jax.tree.leaves(function(x_BTD, head_DV, targets_BT, weights_BT)),
        jax.tree.leaves(function(changed_BTD, head_DV, targets_BT, weights_BT)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "sizes", [(8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 1, 8), (1, 4, 2, 1), (1, 1, 1, 1)]
)
def test_sharded_is_unsharded_in_value_gradient_and_layout(sizes):
    arrays = tuple(jnp.concatenate([a, a]) if a.shape[0] == B else a for a in example())
    function = jax.jit(jax.value_and_grad(functools.partial(loss_only, z_loss=1e-3), (0, 1)))
    expected, expected_grads = function(*arrays)
    with jax.set_mesh(mesh_of(sizes)):
        specs = (P(*TOKENS, None), P(None, "tensor"), TOKENS, TOKENS)
        sharded = tuple(jax.device_put(a, s) for a, s in zip(arrays, specs, strict=True))
        value, grads = function(*sharded)
    assert_near(value, expected, RTOL["float32"])
    for grad, expected_grad, array in zip(grads, expected_grads, sharded, strict=False):
        assert_near(grad, expected_grad, RTOL["float32"])
        assert grad.sharding.is_equivalent_to(array.sharding, grad.ndim)


@pytest.mark.parametrize(("counts", "mean"), [((30, 10), 2.5), ((30, 0), 2.0), ((0, 10), 4.0)])
def test_mean_over_shards_weighs_by_targets(counts, mean):
    # Shard A's tokens cost 2.0 and shard B's 4.0: log(1 + e^a) with the logits (a, 0), target 1.
    x_BTD = jnp.log(jnp.expm1(jnp.array([2.0, 4.0])))[:, None, None] * jnp.ones((2, 40, 1))
    weights_BT = (jnp.arange(40) < jnp.array(counts)[:, None]).astype(jnp.float32)
    with jax.set_mesh(mesh_of((2, 1, 1, 1))):
        x_BTD, targets_BT, weights_BT = (
            jax.device_put(a, TOKENS) for a in (x_BTD, jnp.ones((2, 40), jnp.int32), weights_BT)
        )
        head_DV = jax.device_put(jnp.array([[1.0, 0.0]]), P())
        loss, sums = chunked_cross_entropy(
            x_BTD, head_DV, targets_BT, weights_BT, z_loss=0.0, chunk_size=16
        )
    assert float(loss / sums["tokens"]) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(("differentiated", "matmuls"), [(False, 1), (True, 3)])
def test_logits_are_made_once_and_gradients_only_when_asked_for(differentiated, matmuls):
    arrays = example()
    function = functools.partial(loss_only, chunk_size=1000)
    function = jax.grad(function, (0, 1)) if differentiated else function
    assert str(jax.make_jaxpr(function)(*arrays)).count("dot_general[") == matmuls


def test_memory_is_bounded_by_the_chunk_not_by_the_sequence():
    tokens, vocab, chunk = 1024, 16384, 64
    shapes = [((1, tokens, 8), "float32"), ((8, vocab), "float32")]
    shapes += [((1, tokens), "int32"), ((1, tokens), "float32")]
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def temporary_bytes(function):
        compiled = jax.jit(jax.grad(function, (0, 1))).lower(*abstract).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = temporary_bytes(functools.partial(loss_only, chunk_size=chunk))
    whole = temporary_bytes(lambda *arrays: plain(*arrays, 0.0))
    logits_bytes = 4 * tokens * vocab
    assert whole >= logits_bytes
    # A few arrays of a chunk's logits, and the gradients.
    assert chunked <= 4 * logits_bytes * chunk / tokens + 4 * 8 * (tokens + 4 * vocab)
    assert chunked < whole / 8


def mesh_of(sizes):
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 4, devices=devices)
