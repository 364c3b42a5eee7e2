"""Stochastic rounding: to a neighbour, with the odds that make the mean exact, for all floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.optim.rounding import random_bits, stochastic_bfloat16


def rounded(values, key=0, draws=1):
    x = jnp.broadcast_to(jnp.asarray(values, jnp.float32), (draws, len(values)))
    bits = random_bits(jax.random.key(key), x)
    return np.asarray(jax.jit(stochastic_bfloat16)(x, bits), np.float64)


def neighbours(values):
    words = np.asarray(values, np.float32).view(np.uint32) & 0xFFFF0000
    return words.view(np.float32), (words + 0x10000).view(np.float32)


@pytest.mark.short
def test_only_the_two_neighbours_ever_come_out():
    rng = np.random.default_rng(0)
    exponents = 10.0 ** rng.uniform(-30, 30, 4096)
    values = (rng.standard_normal(4096) * exponents).astype(np.float32)
    towards_zero, away = neighbours(values)
    out = rounded(values)
    assert ((out == towards_zero) | (out == away)).all()
    assert 0.4 < (out == away).mean() < 0.6


def test_the_mean_over_many_draws_is_the_value():
    # 1 + a sixteenth of a unit in the last place, which nearest would always round to 1.
    unit = 2.0**-7
    values = [1 + unit / 16, 1 + unit / 2, -(1 + unit * 0.9), 3e-39, 1e-20 * (1 + unit / 3)]
    draws = 40_000
    out = rounded(values, draws=draws)
    wanted = np.asarray(values, np.float32).astype(np.float64)
    low, high = neighbours(values)
    spread = np.abs(high.astype(np.float64) - low) / 2 / np.sqrt(draws)
    assert (np.abs(out.mean(0) - wanted) < 5 * spread).all()
    assert (out[:, 0] == 1).mean() == pytest.approx(15 / 16, abs=0.01)


def test_what_bfloat16_holds_is_left_alone_and_what_is_not_finite_stays_so():
    held = [0.0, -0.0, 1.0, -2.5, 2.0**-126, float(jnp.finfo(jnp.bfloat16).max), np.inf, -np.inf]
    out = rounded(held, draws=64)
    np.testing.assert_array_equal(out, np.broadcast_to(np.float64(held), out.shape))
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(rounded(nans, draws=64)).all()


@pytest.mark.short
def test_bits_are_the_same_on_every_mesh_and_differ_by_key():
    alone = np.asarray(random_bits(jax.random.key(3), jnp.zeros((8, 16))))
    for sizes in ((8, 1), (2, 4)):
        mesh = jax.make_mesh(sizes, ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
        with jax.set_mesh(mesh):
            like = jax.device_put(jnp.zeros((8, 16)), jax.P("a", "b"))
            bits = jax.jit(random_bits)(jax.random.key(3), like)
            assert bits.sharding.spec == jax.P("a", "b")
        np.testing.assert_array_equal(np.asarray(bits), alone)
    assert (np.asarray(random_bits(jax.random.key(4), jnp.zeros((8, 16)))) != alone).all()
