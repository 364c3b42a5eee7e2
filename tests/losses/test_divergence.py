"""Divergences at values worked out by hand, and their slopes against automatic differentiation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.losses.divergence import divergence

KINDS = ["forward_kl", "reverse_kl", "jsd"]
# Student 3/4, 1/4 and teacher 1/2, 1/2.
STUDENT, TEACHER = jnp.log(jnp.array([[0.75, 0.25]])), jnp.log(jnp.array([[0.5, 0.5]]))


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [
        ("forward_kl", 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)),
        ("reverse_kl", 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)),
        (
            "jsd",  # of the mixture 5/8, 3/8
            0.5 * (0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375))
            + 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)),
        ),
    ],
)
def test_of_a_fair_coin_and_one_of_three_to_one(kind, by_hand):
    loss, _ = divergence(kind, STUDENT, TEACHER)
    np.testing.assert_allclose(loss, [by_hand], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_the_derivatives_by_the_students_logits(kind):
    keys = jax.random.split(jax.random.key(0))
    logits, teacher = (2.0 * jax.random.normal(key, (5, 7)) for key in keys)
    teacher = jax.nn.log_softmax(teacher)

    def loss_of(logits):
        return divergence(kind, jax.nn.log_softmax(logits), teacher, beta=0.3)[0].sum()

    _, slope = divergence(kind, jax.nn.log_softmax(logits), teacher, beta=0.3)
    np.testing.assert_allclose(slope, jax.grad(loss_of)(logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_distribution_and_itself_is_0_with_no_slope(kind):
    loss, slope = divergence(kind, STUDENT, STUDENT)
    np.testing.assert_allclose(loss, [0.0], atol=1e-7)
    np.testing.assert_allclose(slope, np.zeros((1, 2)), atol=1e-7)


def test_jsd_at_a_half_is_symmetric_and_at_most_log_2():
    one, other = (divergence("jsd", *pair)[0] for pair in ((STUDENT, TEACHER), (TEACHER, STUDENT)))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    apart = jnp.array([[0.0, -jnp.inf]]), jnp.array([[-1e4, 0.0]])
    np.testing.assert_allclose(divergence("jsd", *apart)[0], [math.log(2.0)], rtol=1e-6)


def test_jsd_near_its_ends_is_as_steep_as_the_two_kls():
    # The limits of jsd / beta and jsd / (1 - beta) (arXiv 2306.13649, section 2).
    forward, reverse = (divergence(kind, STUDENT, TEACHER)[0] for kind in KINDS[:2])
    low, high = (divergence("jsd", STUDENT, TEACHER, beta=b)[0] for b in (1e-3, 1 - 1e-3))
    np.testing.assert_allclose(low / 1e-3, forward, rtol=2e-3)
    np.testing.assert_allclose(high / 1e-3, reverse, rtol=2e-3)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_what_the_teacher_calls_impossible_adds_what_it_must(kind):
    teacher = jnp.log(jnp.array([[1.0, 0.0]]))
    loss, slope = divergence(kind, STUDENT, teacher)
    assert np.isfinite(loss).all()
    assert np.isfinite(slope).all()
    if kind == "forward_kl":
        np.testing.assert_allclose(loss, [math.log(4 / 3)], rtol=1e-6)
