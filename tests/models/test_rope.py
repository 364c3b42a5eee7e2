"""Rotary frequencies against published values, and the rotation's precision and properties."""

import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest

from llama_jax.config.model import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from llama_jax.models.rope import frequencies, rotate, rotations

pytestmark = pytest.mark.short

PLAIN = RopeConfig(theta=500000.0)


def llama3(factor):
    return RopeConfig(500000.0, Llama3Scaling(factor=factor, original_max_seq_len=8192))


def test_llama_3_1_frequencies_have_the_published_values():
    f = frequencies(llama3(8.0), 128)
    wanted = {
        29: 2.166570764e-03,
        30: 1.371893568e-03,
        34: 1.785078128e-04,
        35: 9.556212354e-05,
        63: 3.068925989e-07,
    }
    np.testing.assert_allclose(f[list(wanted)], list(wanted.values()), rtol=2e-7)


@pytest.mark.parametrize(
    ("head_dim", "factor", "kept", "ratios"),
    [
        (128, 8.0, 29, [0.8281684, 0.6437431, 0.4935071, 0.3711223, 0.2714255, 0.1902107]),
        (64, 32.0, 15, [0.6055728, 0.3037425, 0.1034476]),
        (128, 32.0, 29, [0.8097579, 0.6055728, 0.4392400, 0.3037425, 0.1933639, 0.1034476]),
    ],
)
def test_the_three_bands_lie_where_the_releases_have_them(head_dim, factor, kept, ratios):
    ratio = frequencies(llama3(factor), head_dim) / frequencies(PLAIN, head_dim)
    np.testing.assert_allclose(ratio[:kept], 1.0, rtol=1e-7)
    np.testing.assert_allclose(ratio[kept : kept + len(ratios)], ratios, rtol=1e-6)
    np.testing.assert_allclose(ratio[kept + len(ratios) :], 1 / factor, rtol=1e-6)
    assert len(ratio) == head_dim // 2


def test_equal_band_edges_leave_no_band_to_blend():
    scaling = Llama3Scaling(
        factor=16.0, original_max_seq_len=8192, low_freq_factor=1.0, high_freq_factor=1.0
    )
    ratio = frequencies(RopeConfig(500000.0, scaling), 128) / frequencies(PLAIN, 128)
    np.testing.assert_allclose(ratio, [1.0] * 35 + [1 / 16] * 29, rtol=1e-6)


def test_linear_scaling_divides_positions():
    scaled = RopeConfig(10000.0, LinearScaling(factor=4.0))
    positions_BT = jnp.array([[0, 4, 8, 400]])
    plain = rotations(RopeConfig(10000.0), 8, positions_BT // 4)
    for a, b in zip(rotations(scaled, 8, positions_BT), plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_angles_are_float32_at_positions_that_bfloat16_cannot_hold():
    cos_BTR, sin_BTR = rotations(PLAIN, 128, jnp.array([[1001, 257, 15962, 131071]]))
    assert cos_BTR.dtype == sin_BTR.dtype == jnp.float32
    np.testing.assert_allclose(cos_BTR[0, 0, 0], -0.39194, atol=1e-5)  # cos(1000) is +0.56238
    np.testing.assert_allclose(cos_BTR[0, :3, 0], np.cos([1001, 257, 15962]), atol=1e-6)


@pytest.mark.parametrize(
    ("rope", "head_dim"),
    [(PLAIN, 128), (llama3(8.0), 128), (llama3(32.0), 64), (llama3(32.0), 128)],
    ids=["3", "3.1", "3.2 1B", "3.2 3B"],
)
def test_rotations_are_float64s_at_every_position_to_131_071(rope, head_dim):
    positions = np.concatenate([np.arange(0, 131_072, 997), [1, 2, 8191, 65_535, 65_536, 131_071]])
    cos_BTR, sin_BTR = rotations(rope, head_dim, jnp.asarray(positions)[None])
    turn = np.exp(1j * np.outer(positions, numpy_llama.inverse_wavelengths(rope, head_dim)))
    np.testing.assert_allclose(cos_BTR[0], turn.real, rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin_BTR[0], turn.imag, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(factor=2.0),
        llama3(8.0).scaling,
        YarnScaling(factor=4.0, original_max_seq_len=64, beta_fast=8.0),
    ],
)
def test_rotation_equals_complex_multiplication(scaling):
    rope = RopeConfig(10000.0, scaling)
    x = np.random.default_rng(0).normal(size=(1, 5, 3, 16)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 1000])
    got = rotate(jnp.asarray(x), *rotations(rope, 16, jnp.asarray(positions)[None]))
    np.testing.assert_allclose(got[0], numpy_llama.rotated(x[0], positions, rope), atol=5e-6)
    still = np.float32(numpy_llama.magnitude(scaling)) * x[0, 0]
    np.testing.assert_array_equal(got[0, 0], still)


def test_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    rope = RopeConfig(10000.0)

    def score(i, j):
        turned = (
            rotate(jnp.asarray(x), *rotations(rope, 8, jnp.array([[p]])))
            for x, p in ((q, i), (k, j))
        )
        return float(jnp.vdot(*turned))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert abs(score(5, 2) - score(2, 5)) > 1e-2
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


def test_bfloat16_heads_are_rounded_once():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 1, 1, 64)), jnp.bfloat16)
    tables = rotations(PLAIN, 64, jnp.array([[1001]]))
    low, wide = rotate(x, *tables), rotate(x.astype(jnp.float32), *tables)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, wide.astype(jnp.bfloat16))
