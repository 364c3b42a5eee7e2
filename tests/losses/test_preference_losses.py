"""Preference and reward losses at values worked out by hand, their symmetries and limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.losses.preference import (
    hinge_loss,
    ipo_loss,
    kto_divergence,
    kto_loss,
    sigmoid_loss,
)
from llama_jax.losses.reward import MARGINS, bradley_terry_loss, margins_of, mean_reward_penalty

LOG_3 = math.log(3.0)


def value(array):
    return np.asarray(array).tolist()


def test_dpo_at_margins_whose_sigmoids_are_fractions():
    # sigmoid(0) = 1/2, sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4.
    loss = sigmoid_loss(jnp.array([0.0, LOG_3, -LOG_3]) / 0.1, beta=0.1)
    np.testing.assert_allclose(loss, np.log([2, 4 / 3, 4]), rtol=1e-6)


def test_label_smoothing_mixes_both_orders_of_a_pair():
    margin = jnp.array([LOG_3, -LOG_3])
    loss = sigmoid_loss(margin, beta=1.0, label_smoothing=0.25)
    by_hand = [0.75 * np.log(4 / 3) + 0.25 * np.log(4), 0.75 * np.log(4) + 0.25 * np.log(4 / 3)]
    np.testing.assert_allclose(loss, by_hand, rtol=1e-6)
    half = sigmoid_loss(margin, beta=1.0, label_smoothing=0.5)
    assert half[0] == half[1]  # a label that says nothing


def test_simpo_asks_for_its_gamma():
    loss = sigmoid_loss(jnp.array([1.5]), beta=2.0, gamma=3.0)
    np.testing.assert_allclose(loss, [math.log(2.0)], rtol=1e-6)


def test_ipo_is_least_at_half_of_one_over_beta():
    np.testing.assert_allclose(ipo_loss(jnp.array([5.0, 0.0, 7.0]), beta=0.1), [0.0, 25.0, 4.0])


def test_hinge_ends_where_the_scaled_margin_is_one():
    np.testing.assert_allclose(hinge_loss(jnp.array([0.0, 5.0, 20.0]), beta=0.1), [1.0, 0.5, 0.0])


@pytest.mark.parametrize("loss", [sigmoid_loss, bradley_terry_loss])
def test_swapping_a_pair_changes_the_loss_by_its_margin(loss):
    # -log sigmoid(h) + log sigmoid(-h) = -h, and the gradients of both orders add up to -1.
    margin = jnp.array([0.3, -2.0, 40.0])
    function = (
        (lambda h: sigmoid_loss(h, beta=1.0))
        if loss is sigmoid_loss
        else (lambda h: bradley_terry_loss(h, jnp.zeros_like(h)))
    )
    np.testing.assert_allclose(function(margin) - function(-margin), -margin, rtol=1e-6)
    slopes = jax.vmap(jax.grad(lambda h: function(h).sum()))
    np.testing.assert_allclose(slopes(margin) + slopes(-margin), -1.0, rtol=1e-6)


def test_large_margins_neither_overflow_nor_lose_their_gradient():
    loss = sigmoid_loss(jnp.array([1e4, -1e4]), beta=1.0)
    np.testing.assert_allclose(loss, [0.0, 1e4])
    slope = jax.grad(lambda h: sigmoid_loss(h, beta=1.0))(jnp.float32(-1e4))
    assert float(slope) == -1.0


def test_kto_weighs_desirable_and_undesirable_responses_apart():
    ratios, desirable = jnp.array([LOG_3 + 1.0, LOG_3 + 1.0, 1.0]), jnp.array([True, False, True])
    loss = kto_loss(
        ratios,
        desirable,
        jnp.float32(1.0),
        beta=1.0,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    np.testing.assert_allclose(loss, [2.0 * 0.25, 3.0 * 0.75, 2.0 * 0.5], rtol=1e-6)


def test_ktos_divergence_is_the_mean_of_mismatched_ratios_at_least_0_and_has_no_gradient():
    mismatched = jnp.array([True, False, True, False])
    assert float(kto_divergence(jnp.array([1.0, 50.0, 2.0, -9.0]), mismatched)) == 1.5
    assert float(kto_divergence(jnp.array([-1.0, 50.0, -2.0, 9.0]), mismatched)) == 0.0
    assert float(kto_divergence(jnp.array([1.0, 2.0]), jnp.array([False, False]))) == 0.0
    slope = jax.grad(lambda r: kto_divergence(r, jnp.array([True])))(jnp.array([1.0]))
    assert value(slope) == [0.0]
    of_z = jax.grad(lambda z: kto_loss(jnp.array([0.2]), jnp.array([True]), z, beta=1.0).sum())(
        jnp.float32(0.3)
    )
    assert float(of_z) == 0.0


def test_bradley_terry_at_margins_of_llama_2():
    # Chosen leads by 1: what is left of it decides.
    for strength, left in zip([3, 2, 1, 0], [0.0, 1 / 3, 2 / 3, 1.0], strict=True):
        margin = margins_of(jnp.array(strength), "small")
        loss = bradley_terry_loss(jnp.float32(1.5), jnp.float32(0.5), margin)
        np.testing.assert_allclose(loss, math.log1p(math.exp(-left)), rtol=1e-6)


def test_margins_by_strength_are_those_of_the_papers():
    strengths = jnp.array([[3, 2], [1, 0]])
    np.testing.assert_allclose(margins_of(strengths, "large"), [[3, 2], [1, 0]])
    np.testing.assert_allclose(margins_of(strengths, "small"), [[1, 2 / 3], [1 / 3, 0]])
    np.testing.assert_allclose(margins_of(strengths, "none"), np.zeros((2, 2)))
    assert set(MARGINS) == {"none", "small", "large"}


def test_the_penalty_is_of_a_pairs_mean_and_blind_to_its_difference():
    penalty = mean_reward_penalty(jnp.array([3.0, 5.0, -1.0]), jnp.array([1.0, -5.0, -3.0]))
    np.testing.assert_allclose(penalty, [4.0, 0.0, 4.0])
