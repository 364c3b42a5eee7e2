"""RMSNorm's values, precision and dtypes."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.models.norm import RMSNorm

pytestmark = pytest.mark.short


@pytest.mark.parametrize(("eps", "value"), [(1e-5, 0.0316070), (1e-6, 0.0995037)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_constant_is_normalised_by_the_configured_eps(eps, value, dtype):
    # 1e-4 squared is 1e-8, under eps: the answer is eps's doing.
    x_BTD = jnp.full((1, 1, 8), 1e-4, dtype)
    y = RMSNorm(8, eps, "float32", "norm")(x_BTD)
    assert y.dtype == dtype
    # bfloat16 rounds the input and the output: half of 2^-7 each.
    rtol = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(np.asarray(y, np.float32), value, rtol=rtol)


def test_squares_and_mean_are_float32_in_bfloat16_compute():
    # 4096 ones and one 64: in bfloat16 the sum of squares would stop at 256.
    x_BTD = jnp.ones((1, 1, 4096), jnp.bfloat16).at[0, 0, 0].set(64)
    y = RMSNorm(4096, 1e-6, "float32", "norm")(x_BTD)
    wanted = 1 / np.sqrt((4095 + 64.0**2) / 4096)
    np.testing.assert_allclose(float(y[0, 0, 1]), wanted, rtol=4e-3)


def test_the_scale_multiplies_after_the_cast_back():
    norm = RMSNorm(2, 1e-6, "float32", "norm")
    norm.scale[...] = jnp.array([1.0 + 2**-8, 3.0])  # the first rounds to 1 in bfloat16
    y = norm(jnp.array([[[1.0, 1.0]]], jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(y[0, 0], np.float32), [1.0, 3.0])
    wide = norm(jnp.array([[[1.0, 1.0]]], jnp.float32))
    np.testing.assert_allclose(wide[0, 0], [1.0 + 2**-8, 3.0], rtol=1e-6)
