"""8-bit products: the rounding that is meant, the same on every mesh, and what a chip lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.config.hardware import CHIPS
from llama_jax.config.loading import ConfigError
from llama_jax.quantization import dot
from llama_jax.quantization.dot import quantized_dot, without_units

pytest.importorskip("qwix")
M, C, X = 16, 64, 32
ROWS = ((1,), (0,))  # [M, C] with [C, X]


def operands(seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    # Rows and columns of very different sizes: one scale for all of them would lose the small.
    sizes = 10.0 ** jnp.arange(-4, 4, 0.5)
    a, b = jax.random.normal(a, (M, C)) * sizes[:, None], jax.random.normal(b, (C, X))
    # The largest of each is positive: -127.5 steps are one or the other integer by float's whim.
    largest = jnp.take_along_axis(a, jnp.abs(a).argmax(1, keepdims=True), 1)
    return a * jnp.sign(largest), b * jnp.where(b.max(0) > -b.min(0), 1, -1)


def by_hand(a, b):
    """Each row of a and column of b in whole steps, 127.5 of which are its largest."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    step_a, step_b = (np.abs(x).max(dim, keepdims=True) / 127.5 for dim, x in ((1, a), (0, b)))
    whole_a, whole_b = (np.clip(np.rint(x), -128, 127) for x in (a / step_a, b / step_b))
    return whole_a @ whole_b * step_a * step_b


def error(got, wanted):
    """The largest over rows of the error's size to the row's."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return (np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max()


def test_int8_is_whole_steps_of_a_rows_and_a_columns_largest():
    a, b = operands()
    got = quantized_dot(a, b, ROWS, None, "int8")
    assert got.dtype == jnp.float32
    assert error(got, by_hand(a, b)) < 1e-4
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    assert 1e-3 < error(got, exact) < 0.03


@pytest.mark.parametrize(
    ("roles", "least", "most"),
    [
        (("value", "value"), 0.01, 0.06),  # 3 bits after the point in each operand
        (("gradient", "value"), 0.02, 0.12),  # 2 bits in one of them
        (("value", "gradient"), 0.02, 0.12),
    ],
)
def test_fp8_values_have_a_digit_more_than_gradients(roles, least, most):
    a, b = operands()
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    assert least < error(quantized_dot(a, b, ROWS, None, "fp8", roles), exact) < most


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("a_spec", "b_spec", "layout"),
    [
        (P("a", None), P(None, "b"), P("a", "b")),
        (P("a", "b"), P("b", None), P("a", None)),  # summed over devices
        (P(None, ("a", "b")), P(("a", "b"), None), P("a", None)),  # and scattered
        (P(("a", "b"), None), P("b", None), P("a", "b")),  # rows split as the columns shall be
        (P(None, "a"), P(("a", "b"), None), P(None, "b")),  # one summed dim split further
    ],
    ids=["free", "summed", "scattered", "gathered", "split further"],
)
def test_on_a_mesh_it_is_the_product_and_lies_as_asked(precision, a_spec, b_spec, layout):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    a, b = operands()
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    with jax.set_mesh(mesh):
        a, b = jax.device_put(a, a_spec), jax.device_put(b, b_spec)
        got = jax.jit(lambda a, b: quantized_dot(a, b, ROWS, layout, precision))(a, b)
    assert got.sharding.spec == layout
    assert error(got, exact) < {"int8": 0.03, "fp8": 0.06}[precision]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(precision, bad):
    a, b = operands()
    got = quantized_dot(a.at[3, 5].set(bad), b, ROWS, None, precision, ("gradient", "value"))
    assert not np.isfinite(np.asarray(got[3])).any()
    assert np.isfinite(np.asarray(got[4])).all()


def test_without_qwix_it_is_one_line(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(dot.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"matmul_precision: .* pip install 'llama-jax\[quant\]'"):
        quantized_dot(*operands(), ROWS, None, "int8")


def test_chips_without_faster_units_are_named():
    lines = {
        (name, precision): without_units(precision, CHIPS[name])
        for name in ("v5e", "v6e", "tpu7x")
        for precision in ("default", "int8", "fp8")
    }
    assert {key for key, line in lines.items() if line} == {
        ("v5e", "fp8"),
        ("v6e", "fp8"),
        ("tpu7x", "int8"),
    }
    assert "gains no speed on v5e" in str(lines["v5e", "fp8"])
