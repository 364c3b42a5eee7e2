"""Optimizers against optax and NumPy; the decay mask; layouts of moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config.run import AdafactorConfig, AdamWConfig, LionConfig, MuonConfig
from llama_jax.optim.optimizer import (
    decay_mask,
    make_optimizer,
    restart_schedule,
    schedule_count,
)

OPTIMIZERS = [AdamWConfig(), AdafactorConfig(min_dim_size_to_factor=4), LionConfig(), MuonConfig()]
KINDS = [config.kind for config in OPTIMIZERS]
L, D, N, H, F, V = 2, 8, 4, 4, 16, 32
# Shape and stored layout of a Llama's parameters.
LLAMA = {
    "embedding": ((V, D), P("tensor", "fsdp")),
    "layers": {
        "attn_norm": {"scale": ((L, D), P(None, None))},
        "attention": {
            "q_proj": ((L, D, N, H), P(None, "fsdp", "tensor", None)),
            "o_proj": ((L, N, H, D), P(None, "tensor", None, "fsdp")),
        },
        "mlp_norm": {"scale": ((L, D), P(None, None))},
        "mlp": {
            "up_proj": ((L, D, F), P(None, "fsdp", "tensor")),
            "down_proj": ((L, F, D), P(None, "tensor", "fsdp")),
        },
    },
    "final_norm": {"scale": ((D,), P(None))},
    "lm_head": ((D, V), P("fsdp", "tensor")),
}
NORMS = ["final_norm", "attn_norm", "mlp_norm"]


def constant(rate):
    return lambda count: jnp.float32(rate)


def is_entry(node):
    return isinstance(node, tuple)


def params(seed=0, dtype="float32"):
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    return jax.tree.map(
        lambda entry: jax.random.normal(next(keys), entry[0]).astype(dtype), LLAMA, is_leaf=is_entry
    )


def assert_trees_near(actual, expected, rtol=1e-6, atol=1e-7):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(e, np.float32), rtol=rtol, atol=atol
        ),
        actual,
        expected,
    )


def run(config, start, grads, rate=0.01):
    optimizer = make_optimizer(config, constant(rate))
    state, values = optimizer.init(start), start
    for grad in grads:
        updates, state = jax.jit(optimizer.update)(grad, state, values)
        values = optax.apply_updates(values, updates)
    return values, state


def test_one_hundred_adam_steps_of_1e_4_move_a_weight_of_one_to_0_98999834():
    # The update sequence in float64, with epsilon inside the known answer.
    config = AdamWConfig(b1=0.9, b2=0.999, weight_decay=0.0)
    value, _ = run(config, {"w": jnp.ones(())}, [{"w": jnp.ones(())}] * 100, rate=1e-4)
    assert float(value["w"]) == pytest.approx(0.98999834, abs=1e-7)


def test_adamw_is_numpys_with_decoupled_decay():
    config = AdamWConfig()
    rng = np.random.default_rng(0)
    weight, grads = rng.normal(size=5), rng.normal(size=(7, 5))
    m = v = np.zeros(5)
    expected = weight.copy()
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        expected -= 0.01 * (step + 0.1 * expected)
    start = {"w": jnp.array(weight, jnp.float32)}
    actual, _ = run(config, start, [{"w": jnp.array(g, jnp.float32)} for g in grads])
    np.testing.assert_allclose(actual["w"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "oracle"),
    [
        (AdamWConfig(), optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=decay_mask)),
        (LionConfig(), optax.lion(0.01, 0.9, 0.99, weight_decay=0.1, mask=decay_mask)),
        (
            AdafactorConfig(min_dim_size_to_factor=4),
            optax.adafactor(0.01, min_dim_size_to_factor=4),
        ),
    ],
    ids=["adamw", "lion", "adafactor"],
)
def test_three_updates_are_optaxs(config, oracle):
    grads = [params(seed) for seed in (1, 2, 3)]
    expected, state = params(), oracle.init(params())
    for grad in grads:
        updates, state = oracle.update(grad, state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_trees_near(run(config, params(), grads)[0], expected)


def test_muons_update_of_a_matrix_is_orthogonal_at_adams_size():
    config = MuonConfig(weight_decay=0.0, ns_steps=5)
    optimizer = make_optimizer(config, constant(1.0))
    updates, _ = optimizer.update(params(1), optimizer.init(params()), params())
    # [L, D, N, H] is a batch of D x (N H) matrices; rms 0.2, so singular values near 0.2 sqrt(NH).
    q_LDO = np.asarray(updates["layers"]["attention"]["q_proj"]).reshape(L, D, N * H)
    for matrix in q_LDO:
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(N * H))
        assert 0.6 < singular.min() <= singular.max() < 1.3  # what five quintic steps reach
    # NumPy's own Newton-Schulz on the first layer's gradient (the first momentum, up to scale).
    x = np.asarray(params(1)["layers"]["attention"]["q_proj"][0], np.float64).reshape(D, N * H)
    x /= np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    np.testing.assert_allclose(-q_LDO[0], 0.2 * np.sqrt(N * H) * x, rtol=0, atol=1e-4)


def test_muon_leaves_embedding_head_and_norms_to_adamw():
    muon, _ = run(MuonConfig(adam_scale=0.5), params(), [params(1), params(2)])
    # Half the rate for both the step and the decay.
    adam, _ = run(AdamWConfig(), params(), [params(1), params(2)], rate=0.005)
    for name in ("embedding", "lm_head", "final_norm"):
        assert_trees_near(muon[name], adam[name])
    assert np.abs(muon["layers"]["mlp"]["up_proj"] - adam["layers"]["mlp"]["up_proj"]).max() > 1e-3


@pytest.mark.parametrize("config", OPTIMIZERS, ids=KINDS)
def test_with_zero_gradients_matrices_decay_and_norm_scales_stay_exactly(config):
    config = type(config)(weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params())
    values, _ = run(config, params(), [zeros, zeros], rate=0.1)

    def check(path, before, after):
        if any(name in str(path) for name in NORMS):
            np.testing.assert_array_equal(before, after)
        else:
            np.testing.assert_allclose(after, 0.95**2 * before, rtol=1e-5)

    jax.tree_util.tree_map_with_path(check, params(), values)


def test_the_decay_mask_goes_by_name_though_stacked_scales_have_two_dims():
    mask = jax.tree_util.tree_flatten_with_path(decay_mask(params()))[0]
    kept = {jax.tree_util.keystr(path) for path, decays in mask if not decays}
    assert kept == {
        "['final_norm']['scale']",
        "['layers']['attn_norm']['scale']",
        "['layers']['mlp_norm']['scale']",
    }


@pytest.mark.parametrize("config", OPTIMIZERS, ids=KINDS)
def test_moments_of_bfloat16_parameters_are_float32(config):
    values, state = run(config, params(dtype="bfloat16"), [params(1)] * 2)
    floating = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert {str(array.dtype) for array in floating} == {"float32"}
    assert {str(array.dtype) for array in jax.tree.leaves(values)} == {"bfloat16"}


@pytest.mark.parametrize("config", OPTIMIZERS, ids=KINDS)
def test_moments_lie_as_their_parameters_and_the_update_is_the_unsharded_one(config):
    mesh = jax.make_mesh(
        (2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )
    layout = jax.tree.map(lambda entry: NamedSharding(mesh, entry[1]), LLAMA, is_leaf=is_entry)
    expected, _ = run(config, params(), [params(1), params(2)])
    optimizer = make_optimizer(config, constant(0.01))
    with jax.set_mesh(mesh):
        start, *grads = (jax.device_put(params(seed), layout) for seed in (0, 1, 2))
        before = jax.jit(optimizer.init)(start)
        values, after = run(config, start, grads)
    assert_trees_near(values, expected, rtol=1e-5, atol=1e-6)
    assert_same_layout(values, start)
    # Every moment of a parameter's shape lies as the parameter does, at first and ever after.
    by_shape = {a.shape: a.sharding for a in jax.tree.leaves(start)}
    for state in (before, after):
        moments = [a for a in jax.tree.leaves(state) if a.ndim >= 2 and a.shape in by_shape]
        if config.kind == "adafactor":  # keeps no moment whole; its factors have their own test
            continue
        assert len(moments) >= 8
        for moment in moments:
            assert moment.sharding.is_equivalent_to(by_shape[moment.shape], moment.ndim)
    assert_same_layout(before, after)


def test_adafactors_factors_lie_as_the_dims_that_they_keep():
    mesh = jax.make_mesh(
        (2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh):
        up_proj = jax.device_put(jnp.ones((L, D, F)), P(None, "fsdp", "tensor"))
        optimizer = make_optimizer(AdafactorConfig(min_dim_size_to_factor=4), constant(0.01))
        state = jax.jit(optimizer.init)({"up_proj": up_proj})
    factors = {a.shape: a.sharding.spec for a in jax.tree.leaves(state) if a.ndim == 2}
    assert factors == {(L, D): P(None, "fsdp"), (L, F): P(None, "tensor")}


@pytest.mark.parametrize("config", OPTIMIZERS, ids=KINDS)
def test_a_restarted_schedule_keeps_moments_and_their_own_count(config):
    _, state = run(config, params(), [params(1)] * 3)
    restarted = restart_schedule(state)
    assert (int(schedule_count(state)), int(schedule_count(restarted))) == (3, 0)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restarted), strict=True)
    ]
    assert sum(changed) == 1


def assert_same_layout(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape
        assert a.sharding.is_equivalent_to(e.sharding, a.ndim)
