"""Chunked distillation against the plain form, stored teachers, shards and memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llama_jax.losses.distillation import LiveTeacher, StoredTeacher, distillation_loss
from llama_jax.losses.divergence import divergence
from llama_jax.losses.matching import Matching

RTOL = 1e-5  # of the largest value: chunks only change the order of float32 sums
AXES = ("data", "fsdp", "context", "tensor")
TOKENS, X = P(("data", "fsdp"), "context"), P(("data", "fsdp"), ("context", "tensor"), None)
B, T, D, E, V, K = 8, 8, 16, 12, 64, 6
KINDS = [
    Matching("forward_kl"),
    Matching("reverse_kl", temperature=2.0),
    Matching("jsd", beta=0.3, temperature=0.5),
]


def example(masked=0.3):
    keys = jax.random.split(jax.random.key(0), 6)
    student = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    teacher = jax.random.normal(keys[2], (B, T, E)), jax.random.normal(keys[3], (E, V))
    targets_BT = jax.random.randint(keys[4], (B, T), 0, V)
    weights_BT = (jax.random.uniform(keys[5], (B, T)) >= masked).astype(jnp.float32)
    return student, LiveTeacher(*teacher), targets_BT, weights_BT


def stored(teacher, top=K):
    logps, ids = jax.lax.top_k(jax.nn.log_softmax(teacher.x @ teacher.head), top)
    return StoredTeacher(ids, logps)


def plain(x_BTD, head_DV, teacher, targets_BT, weights_BT, matching):
    student, teacher = (
        jax.nn.log_softmax(x @ head / matching.temperature).reshape(B * T, V)
        for x, head in ((x_BTD, head_DV), teacher)
    )
    loss, _ = divergence(matching.kind, student, teacher, beta=matching.beta)
    return matching.temperature**2 * (weights_BT.reshape(-1) * loss).sum()


def plain_stored(x_BTD, head_DV, teacher, targets_BT, weights_BT, matching):
    """The K + 1 outcomes, by probabilities and not by their logs."""
    p = jax.nn.softmax(x_BTD @ head_DV).reshape(B * T, V)
    picked = jnp.take_along_axis(p, teacher.ids.reshape(B * T, -1), axis=1)
    q = jnp.exp(teacher.logps).reshape(B * T, -1)
    student, stored = (
        jnp.concatenate([kept, 1.0 - kept.sum(1, keepdims=True)], axis=1)
        ** (1 / matching.temperature)
        for kept in (picked, q)
    )
    logs = [jnp.log(outcomes / outcomes.sum(1, keepdims=True)) for outcomes in (student, stored)]
    loss, _ = divergence(matching.kind, *logs, beta=matching.beta)
    return matching.temperature**2 * (weights_BT.reshape(-1) * loss).sum()


def chunked(x_BTD, head_DV, teacher, targets_BT, weights_BT, matching, chunk_size=7):
    return distillation_loss(
        x_BTD, head_DV, teacher, targets_BT, weights_BT, matching=matching, chunk_size=chunk_size
    )[0]


def run(function, student, *rest, **options):
    both = jax.value_and_grad(functools.partial(function, **options), (0, 1))
    value, grads = jax.jit(both)(*student, *rest)
    return value, *grads


def assert_near(actual, expected, rtol=RTOL):
    for one, other in zip(actual, expected, strict=True):
        scale = np.abs(np.asarray(other)).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("matching", KINDS, ids=lambda matching: matching.kind)
def test_values_and_gradients_are_the_plain_forms(matching):
    arrays = example()
    expected = run(plain, *arrays, matching=matching)
    assert_near(run(chunked, *arrays, matching=matching), expected)


@pytest.mark.parametrize("matching", KINDS, ids=lambda matching: matching.kind)
def test_a_stored_teacher_lumps_the_rest_into_one_outcome(matching):
    student, teacher, *rest = example()
    arrays = (student, stored(teacher), *rest)
    expected = run(plain_stored, *arrays, matching=matching)
    assert_near(run(chunked, *arrays, matching=matching), expected, rtol=1e-4)


@pytest.mark.parametrize("matching", KINDS, ids=lambda matching: matching.kind)
def test_a_teacher_stored_whole_is_the_live_one(matching):
    student, teacher, *rest = example()
    live = run(chunked, student, teacher, *rest, matching=matching)
    whole = run(chunked, student, stored(teacher, V), *rest, matching=matching)
    assert_near(whole, live, rtol=2e-5)


def test_lumping_only_ever_lowers_the_divergence():
    student, teacher, *rest = example()
    values = [float(chunked(*student, stored(teacher, k), *rest, KINDS[0])) for k in (1, 4, 16, V)]
    assert values == sorted(values)
    assert values[0] > 0


def test_sums_hold_the_students_cross_entropy_with_the_targets():
    (x_BTD, head_DV), teacher, targets_BT, weights_BT = example()
    _, sums = distillation_loss(
        *(x_BTD, head_DV, teacher, targets_BT, weights_BT), matching=KINDS[1], chunk_size=7
    )
    logps = jnp.take_along_axis(jax.nn.log_softmax(x_BTD @ head_DV), targets_BT[..., None], -1)
    expected = float(-(weights_BT * logps[..., 0]).sum())
    assert float(sums["cross_entropy"]) == pytest.approx(expected, rel=1e-5)
    assert float(sums["tokens"]) == float(weights_BT.sum())
    assert set(sums) == {"cross_entropy", "tokens"}


def test_a_masked_tokens_values_change_nothing():
    (x_BTD, head_DV), teacher, targets_BT, weights_BT = example()
    used = weights_BT[..., None] > 0
    broken = (jnp.where(used, x_BTD, jnp.nan), head_DV)
    odd = teacher._replace(x=jnp.where(used, teacher.x, jnp.nan))
    for one, other in zip(
        run(chunked, (x_BTD, head_DV), teacher, targets_BT, weights_BT, matching=KINDS[0]),
        run(chunked, broken, odd, targets_BT, weights_BT, matching=KINDS[0]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@functools.cache
def unsharded(form):
    student, teacher, *rest = example()
    teacher = teacher if form == "live" else stored(teacher)
    return run(chunked, student, teacher, *rest, matching=KINDS[2])


@pytest.mark.parametrize(
    ("sizes", "vocab", "form"),
    [
        ((8, 1, 1, 1), None, "live"),
        ((1, 2, 2, 2), ("tensor", "fsdp"), "live"),
        ((1, 2, 2, 2), ("tensor", "fsdp"), "stored"),
        ((2, 1, 1, 4), "tensor", "stored"),
    ],
)
def test_sharded_is_unsharded_in_value_gradients_and_layout(sizes, vocab, form):
    student, teacher, targets_BT, weights_BT = example()
    teacher = teacher if form == "live" else stored(teacher)
    mesh = jax.make_mesh(
        sizes,
        AXES,
        axis_types=(AxisType.Explicit,) * 4,
        devices=jax.devices()[: math.prod(sizes)],
    )
    head = P(None, vocab)
    specs = (X, head) if form == "live" else (P(*TOKENS, None),) * 2
    with jax.set_mesh(mesh):
        student = tuple(map(jax.device_put, student, (X, head)))
        teacher = type(teacher)(*map(jax.device_put, teacher, specs))
        rest = [jax.device_put(array, TOKENS) for array in (targets_BT, weights_BT)]
        actual = run(chunked, student, teacher, *rest, matching=KINDS[2], chunk_size=3)
    assert_near(actual, unsharded(form), rtol=2e-5)
    for grad, array in zip(actual[1:], student, strict=True):
        assert grad.sharding.is_equivalent_to(array.sharding, grad.ndim)


def test_memory_is_bounded_by_the_chunk_not_by_the_sequence():
    tokens, vocab, chunk = 1024, 16384, 64

    def loss(x_BTD, head_DV, teacher_x, teacher_head, targets_BT):
        teacher, weights_BT = LiveTeacher(teacher_x, teacher_head), jnp.ones((1, tokens))
        return chunked(x_BTD, head_DV, teacher, targets_BT, weights_BT, Matching(), chunk)

    shapes = [((1, tokens, 8), "f4"), ((8, vocab), "f4")] * 2 + [((1, tokens), "i4")]
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*abstract).compile()
    logits_bytes = 4 * tokens * vocab  # of one model, whole
    bound = 8 * logits_bytes * chunk / tokens + 4 * 8 * (tokens + 4 * vocab)
    assert compiled.memory_analysis().temp_size_in_bytes <= bound < logits_bytes


def test_a_vocabulary_that_does_not_fit_is_refused():
    student, teacher, *rest = example()
    with pytest.raises(ValueError, match=r"the teacher has 63 tokens in its vocabulary, the stud"):
        chunked(*student, teacher._replace(head=teacher.head[:, 1:]), *rest, KINDS[0])
