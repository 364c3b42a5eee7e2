"""The step: sharded = unsharded, accumulation, clipping, skipping, counts, donation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_llama import ONE, SCHEDULE, STEPS, make_batch, make_trainer, place, to_numpy

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import AdamWConfig, LionConfig, MeshConfig, ScheduleConfig, TrainingConfig
from llama_jax.optim.optimizer import make_optimizer, schedule_count
from llama_jax.optim.schedule import make_schedule
from llama_jax.training.networks import Networks
from llama_jax.training.state import (
    TrainState,
    abstract_state,
    add_tokens,
    begin_stage,
    init_state,
    target_tokens,
)
from llama_jax.training.step import make_eval_step, make_train_step, split_microbatches

RTOL = 1e-5  # float32: other orders of the same sums
ATOL_UPDATE = 1e-6
# Adam's first update is about the sign of the gradient, which for entries near zero is rounding's
# to choose. With a larger eps the update is a smooth function of the gradient.
SMOOTH_ADAMW = AdamWConfig(eps=1e-3)
# data, fsdp, context, tensor.
MESHES = [
    (1, 8, 1, 1),
    (8, 1, 1, 1),
    (1, 2, 1, 4),
    (2, 2, 1, 2),
    (1, 4, 1, 2),
    (1, 1, 1, 8),
    (1, 4, 2, 1),
    (1, 2, 2, 2),
]


class Linear(nnx.Module):
    """Just a parameter, for steps whose gradient can be typed out."""

    def __init__(self, value):
        self.weight = nnx.Param(value)


def weighted_rows(model, batch, key, frozen):
    """Loss sum over tokens of mask * target * weight[token]: its gradient is the targets."""
    del key, frozen
    weights_BT = model.weight[...][batch["tokens"]]
    mask_BT = batch["loss_mask"]
    loss = (mask_BT * batch["targets"] * weights_BT).sum()
    return loss, {"tokens": mask_BT.sum()}


weighted_rows.counts = ("tokens",)


def linear_step(weight, *, microbatches=1, clip_norm=None, rate=1.0):
    """A step on `Linear` with plain gradient descent, and its state."""
    graphdef, params = nnx.split(Linear(jnp.asarray(weight, jnp.float32)))
    params = jax.device_put(params, jax.NamedSharding(one_device(), jax.P()))
    schedule = make_schedule(ScheduleConfig(peak=rate, kind="constant"), STEPS)
    optimizer = optax.sgd(schedule)
    config = TrainingConfig(steps=STEPS, microbatches=microbatches, clip_norm=clip_norm)
    step = make_train_step(Networks(graphdef), weighted_rows, optimizer, schedule, config)
    return step, init_state(params, optimizer, jax.random.key(0))


def one_device():
    return jax.make_mesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:1]
    )


def rows(tokens, targets, mask=None):
    tokens, targets = np.array(tokens, np.int32), np.array(targets, np.float32)
    mask = np.ones_like(targets) if mask is None else np.array(mask, np.float32)
    return {"tokens": tokens, "targets": targets, "loss_mask": mask}


@pytest.fixture(scope="module")
def unsharded():
    trainer = make_trainer(ONE, optimizer=SMOOTH_ADAMW)
    history = trainer.train([make_batch(0)])
    return history[0], to_numpy(trainer.state.params)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_one_update_on_every_mesh_of_eight_is_the_unsharded_one(sizes, unsharded):
    expected, expected_params = unsharded
    trainer = make_trainer(MeshConfig(*sizes), optimizer=SMOOTH_ADAMW)
    before = [array.sharding for array in jax.tree.leaves(trainer.state)]
    (metrics,) = trainer.train([make_batch(0)])
    for name in ("loss", "cross_entropy", "grad_norm", "param_norm", "tokens"):
        assert metrics[name] == pytest.approx(expected[name], rel=RTOL), name
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a), e, rtol=0, atol=ATOL_UPDATE),
        trainer.state.params,
        expected_params,
    )
    for array, sharding in zip(jax.tree.leaves(trainer.state), before, strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)


@pytest.mark.parametrize(
    ("sizes", "microbatches"),
    [((1, 1, 1, 1), 2), ((1, 1, 1, 1), 4), ((1, 2, 1, 2), 4), ((2, 1, 2, 1), 2)],
)
def test_microbatches_give_the_update_of_the_whole_batch(sizes, microbatches, unsharded):
    expected, expected_params = unsharded
    trainer = make_trainer(MeshConfig(*sizes), microbatches=microbatches, optimizer=SMOOTH_ADAMW)
    (metrics,) = trainer.train([make_batch(0)])
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=RTOL)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a), e, rtol=0, atol=ATOL_UPDATE),
        trainer.state.params,
        expected_params,
    )


@pytest.mark.parametrize("microbatches", [1, 2])
def test_loss_is_the_mean_over_targets_not_of_means(microbatches):
    # One token of loss 1; nine of mean 3: 2.8, where a mean of means says 2.
    mask = np.array([[1] + [0] * 8, [1] * 9])
    step, state = linear_step([1.0], microbatches=microbatches)
    batch = rows(np.zeros((2, 9)), [[1.0] * 9, [3.0] * 9], mask)
    state, metrics = step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(2.8)
    assert float(metrics["tokens"]) == 10
    assert float(metrics["grad_norm"]) == pytest.approx(2.8)
    assert float(state.params["weight"][...][0]) == pytest.approx(1.0 - 2.8)


def test_the_norm_is_global_logged_before_clipping_and_clipped_to_the_limit():
    step, state = linear_step([0.0, 0.0], clip_norm=1.0)
    state, metrics = step(state, rows([[0, 1]], [[6.0, 8.0]]))  # mean gradient (3, 4)
    assert float(metrics["grad_norm"]) == pytest.approx(5.0)
    np.testing.assert_allclose(state.params["weight"][...], [-0.6, -0.8], rtol=1e-6)


def test_microbatches_are_averaged_before_they_are_clipped():
    # Gradients (10, 0) and (-9, 0): the mean is (0.5, 0), under the limit; clipped first, it is 0.
    step, state = linear_step([0.0, 0.0], microbatches=2, clip_norm=1.0)
    state, metrics = step(state, rows([[0], [0]], [[10.0], [-9.0]]))
    assert float(metrics["grad_norm"]) == pytest.approx(0.5)
    np.testing.assert_allclose(state.params["weight"][...], [-0.5, 0.0], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30], ids=["nan", "inf", "overflowing norm"])
def test_a_non_finite_step_changes_nothing_but_its_counters(bad):
    trainer = make_trainer()
    (good,) = trainer.train([make_batch(0)])

    def poison(path, array):
        factor = bad if "final_norm" in jax.tree_util.keystr(path) else 1.0
        return jax.device_put(np.asarray(array) * np.float32(factor), array.sharding)

    poisoned = jax.tree_util.tree_map_with_path(poison, trainer.state.params)
    trainer.state = dataclasses.replace(trainer.state, params=poisoned)
    before = to_numpy((trainer.state.params, trainer.state.opt_state))
    metrics = trainer.train([make_batch(1), make_batch(2)])[-1]
    after = to_numpy((trainer.state.params, trainer.state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert good["skipped"] == 0.0
    assert (metrics["skipped"], metrics["skipped_steps"], metrics["consecutive_skips"]) == (1, 2, 2)
    # The data has moved on, the schedule has not.
    assert int(trainer.state.step) == 3
    assert int(schedule_count(trainer.state.opt_state)) == 1


def test_a_good_step_ends_a_row_of_skips_and_empty_ones_leave_it():
    step, state = linear_step([1.0])
    good, empty = rows([[0]], [[1.0]]), rows([[0]], [[1.0]], [[0.0]])
    bad = rows([[0]], [[np.inf]])
    seen = []
    for batch in (bad, bad, empty, good, empty, bad):
        state, metrics = step(state, batch)
        seen.append(
            tuple(int(metrics[n]) for n in ("skipped", "skipped_steps", "consecutive_skips"))
        )
    assert seen == [(1, 1, 1), (1, 2, 2), (1, 3, 2), (0, 3, 0), (1, 4, 0), (1, 5, 1)]
    assert target_tokens(state) == 1


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_batch_without_targets_costs_zero_and_leaves_weights_and_moments(microbatches):
    trainer = make_trainer(microbatches=microbatches)
    trainer.train([make_batch(0)])
    before = to_numpy((trainer.state.params, trainer.state.opt_state))
    (metrics,) = trainer.train([make_batch(1, masked=1.0)])
    after = to_numpy((trainer.state.params, trainer.state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert (metrics["loss"], metrics["grad_norm"], metrics["tokens"]) == (0.0, 0.0, 0.0)
    assert (metrics["skipped"], metrics["consecutive_skips"]) == (1.0, 0.0)


def test_logged_rates_are_those_applied_the_same_for_any_number_of_microbatches():
    schedule = ScheduleConfig(
        peak=1.0, kind="warmup_stable_decay", warmup_steps=4, decay_steps=4, final_fraction=0.0
    )
    rates = make_schedule(schedule, 10)
    graphdef, params = nnx.split(Linear(jnp.zeros((1,))))
    params = jax.device_put(params, jax.NamedSharding(one_device(), jax.P()))
    for microbatches in (1, 4):
        optimizer = optax.scale_by_learning_rate(rates)
        config = TrainingConfig(steps=10, microbatches=microbatches, clip_norm=None)
        step = make_train_step(Networks(graphdef), weighted_rows, optimizer, rates, config)
        state = init_state(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))
        logged, applied, weight = [], [], 0.0
        for _ in range(10):
            state, metrics = step(state, rows([[0]] * 4, [[1.0]] * 4))
            logged.append(float(metrics["learning_rate"]))
            applied.append(weight - float(state.params["weight"][...][0]))
            weight -= applied[-1]
        assert logged == [0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0]
        np.testing.assert_allclose(applied, logged, atol=1e-6)


def test_annealing_from_a_checkpoint_starts_its_own_schedule_and_keeps_moments():
    # 13 updates of a 20-update run, then 10 of annealing from the rate reached there.
    run = make_schedule(ScheduleConfig(peak=1.0, kind="linear", final_fraction=0.0), 20)
    params = {"w": jnp.zeros(()), "b": jnp.ones(())}
    optimizer = make_optimizer(AdamWConfig(), run)
    params = jax.device_put(params, jax.NamedSharding(one_device(), jax.P()))
    state = init_state(params, optimizer, jax.random.key(0))
    for _ in range(13):
        _, opt_state = optimizer.update(params, state.opt_state, params)
        state = dataclasses.replace(state, step=state.step + 1, opt_state=opt_state)
    reached = float(run(12))
    anneal = make_schedule(ScheduleConfig(peak=reached, kind="anneal"), 10)
    stage = begin_stage(state)
    count = int(schedule_count(stage.opt_state))
    assert (int(stage.step), count) == (0, 0)
    assert float(anneal(count)) == pytest.approx(reached)
    assert float(anneal(count + 9)) == 0.0
    moments = [
        (a, b)
        for a, b in zip(
            jax.tree.leaves(state.opt_state), jax.tree.leaves(stage.opt_state), strict=True
        )
        if a.dtype == jnp.float32
    ]
    assert len(moments) == 4
    for a, b in moments:
        np.testing.assert_array_equal(a, b)


def test_the_state_is_donated_and_the_step_compiles_once():
    trainer = make_trainer(MeshConfig(1, 2, 1, 2), microbatches=2)
    old = trainer.state
    trainer.train([make_batch(0), make_batch(1), make_batch(2)])
    assert all(array.is_deleted() for array in jax.tree.leaves(old.params))
    assert all(array.is_deleted() for array in jax.tree.leaves(old.opt_state) if array.ndim > 1)
    assert trainer.step.compilations == 1
    trainer.train([make_batch(0, length=8)])
    assert trainer.step.compilations == 2


def test_evaluation_gives_sums_and_compiles_once():
    trainer = make_trainer()
    evaluate = make_eval_step(Networks(trainer.graphdef), trainer.objective)
    batch = make_batch(3)
    with jax.set_mesh(trainer.mesh):
        sums = [evaluate(trainer.state.params, {}, place(batch, trainer.mesh)) for _ in range(2)]
    (metrics,) = trainer.train([batch])
    tokens = float(sums[0]["tokens"])
    assert tokens == batch["loss_mask"].sum()
    assert float(sums[0]["loss"]) / tokens == pytest.approx(metrics["loss"], rel=1e-6)
    assert evaluate.compilations == 1


def test_microbatches_take_rows_of_every_device_and_send_nothing():
    mesh = make_trainer_mesh((2, 1, 1, 1))
    with jax.set_mesh(mesh):
        batch = place({"tokens": np.arange(8, dtype=np.int32)[:, None]}, mesh)
        split = jax.jit(split_microbatches, static_argnums=1)
        parts = split(batch, 2)["tokens"]
        compiled = split.lower(batch, 2).compile().as_text()
    assert np.asarray(parts)[..., 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert parts.sharding.shard_shape(parts.shape) == (2, 2, 1)
    for collective in ("all-to-all", "all-gather", "collective-permute", "all-reduce"):
        assert collective not in compiled


def test_microbatches_that_do_not_divide_a_devices_rows_are_named():
    trainer = make_trainer(MeshConfig(2, 2, 1, 1), microbatches=4)
    with pytest.raises(
        ConfigError,
        match=r"microbatches: 4 does not divide the 2 sequences that "
        r"each of 4 batch shards has of data.batch_size, 8",
    ):
        trainer.train([make_batch(0)])


@pytest.mark.parametrize("optimizer", [AdamWConfig(), LionConfig()], ids=["adamw", "lion"])
def test_the_abstract_state_is_the_real_ones_shapes_and_layout(optimizer):
    trainer = make_trainer(MeshConfig(1, 2, 1, 2), optimizer=optimizer)
    rates = make_schedule(SCHEDULE, STEPS)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), trainer.state.params
    )
    abstract = abstract_state(shapes, make_optimizer(optimizer, rates), jax.random.key(7))
    assert isinstance(abstract, TrainState)
    for a, real in zip(jax.tree.leaves(abstract), jax.tree.leaves(trainer.state), strict=True):
        assert (a.shape, a.dtype) == (real.shape, real.dtype)
        assert a.sharding.is_equivalent_to(real.sharding, real.ndim)


def test_target_tokens_are_counted_beyond_what_32_bits_hold():
    total = jnp.array([2, 999_999], jnp.int32)
    assert add_tokens(total, jnp.float32(3.0)).tolist() == [3, 2]
    assert add_tokens(jnp.array([5000, 0]), jnp.float32(8_388_608)).tolist() == [5008, 388_608]


def make_trainer_mesh(sizes):
    return jax.make_mesh(
        sizes,
        ("data", "fsdp", "context", "tensor"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 4,
        devices=jax.devices()[: int(np.prod(sizes))],
    )
