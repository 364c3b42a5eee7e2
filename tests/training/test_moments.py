"""Training with rounded and offloaded moments: near float32's, and saved, restored and gone on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from tiny_llama import EXECUTION, MODEL, ONE, SCHEDULE, STEPS, make_batch, make_trainer, to_numpy

from llama_jax.checkpoint.manager import Checkpoints
from llama_jax.config.run import (
    AdamWConfig,
    CheckpointConfig,
    LionConfig,
    MeshConfig,
    NextTokenConfig,
    TrainingConfig,
)
from llama_jax.models.accounting import optimizer_bytes
from llama_jax.models.init import abstract_model
from llama_jax.objectives.objective import make_objective
from llama_jax.optim.optimizer import make_optimizer
from llama_jax.optim.schedule import make_schedule
from llama_jax.sharding.mesh import make_mesh
from llama_jax.sharding.rules import batch_sharding
from llama_jax.training.networks import Networks
from llama_jax.training.state import abstract_state
from llama_jax.training.step import make_train_step

SMALL = AdamWConfig(moments="bfloat16", offload_moments=True)
MESH = MeshConfig(1, 2, 1, 2)


def losses(optimizer, steps=12):
    history = make_trainer(MESH, optimizer=optimizer).train(
        [make_batch(step % 3) for step in range(steps)]
    )
    return np.array([metrics["loss"] for metrics in history])


def test_rounded_moments_learn_as_float32_ones_do():
    exact, rounded = losses(AdamWConfig()), losses(AdamWConfig(moments="bfloat16"))
    assert exact[-1] < exact[0] - 0.3  # there was something to learn
    assert np.abs(rounded - exact).max() < 0.02 * (exact[0] - exact[-1])
    assert not np.array_equal(rounded, exact)


def test_offloaded_float32_moments_change_nothing():
    offloaded = losses(AdamWConfig(offload_moments=True), steps=6)
    np.testing.assert_allclose(offloaded, losses(AdamWConfig(), steps=6), rtol=1e-6)


def test_a_resumed_run_with_rounded_offloaded_moments_is_the_uninterrupted_one(tmp_path):
    batches = [make_batch(step) for step in range(5)]
    whole = make_trainer(MESH, optimizer=SMALL)
    whole.train(batches)
    first = make_trainer(MESH, optimizer=SMALL)
    first.train(batches[:3])
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, first.state, {})
        first.train(batches[3:4])  # donates what is being saved
    again = make_trainer(MESH, optimizer=SMALL)
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), again.state.params
    )
    optimizer = make_optimizer(SMALL, make_schedule(SCHEDULE, STEPS))
    with jax.set_mesh(again.mesh), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        wanted = abstract_state(params, optimizer, jax.random.key(7))
        again.state = checkpoints.restore_latest(wanted).state
    for array, abstract in zip(jax.tree.leaves(again.state), jax.tree.leaves(wanted), strict=True):
        assert array.sharding.memory_kind == (abstract.sharding.memory_kind or "device")
    kinds = [array.sharding.memory_kind for array in jax.tree.leaves(again.state.opt_state)]
    assert kinds.count("pinned_host") == 2 * 8  # an embedding and seven matrices
    again.train(batches[3:])
    jax.tree.map(
        np.testing.assert_array_equal,
        to_numpy((again.state.params, again.state.opt_state)),
        to_numpy((whole.state.params, whole.state.opt_state)),
    )
    assert again.step.compilations == 1
    # The same checkpoint goes on with its moments on the device.
    on_device = make_optimizer(AdamWConfig(moments="bfloat16"), make_schedule(SCHEDULE, STEPS))
    with jax.set_mesh(again.mesh), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        wanted = abstract_state(params, on_device, jax.random.key(7))
        moved = checkpoints.restore_latest(wanted).state
    kinds = {array.sharding.memory_kind for array in jax.tree.leaves(moved)}
    assert kinds == {"device"}


def test_a_bad_batch_leaves_moments_on_the_host_too():
    trainer = make_trainer(MESH, optimizer=SMALL)
    trainer.train([make_batch(0)])
    before = to_numpy(trainer.state.opt_state)
    (metrics,) = trainer.train([make_batch(1, masked=1.0)])
    assert metrics["skipped"] == 1.0
    jax.tree.map(np.testing.assert_array_equal, before, to_numpy(trainer.state.opt_state))


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_on_a_tpu_the_hosts_moments_are_updated_in_place(moments):
    pytest.importorskip("libtpu")
    mesh = make_mesh(
        MeshConfig(), topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    )
    config = AdamWConfig(moments=moments, offload_moments=True)
    schedule = make_schedule(SCHEDULE, STEPS)
    optimizer = make_optimizer(config, schedule)
    objective = make_objective(NextTokenConfig(), EXECUTION)
    graphdef, params = abstract_model(MODEL, EXECUTION, mesh)
    sharding = batch_sharding(mesh)
    batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        make_batch(0),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        state = abstract_state(params, optimizer, key)
        step = make_train_step(
            Networks(graphdef), objective, optimizer, schedule, TrainingConfig(steps=STEPS)
        )
        memory = step.lower(state, batch).compile().memory_analysis()
    on_host = [
        leaf
        for leaf in jax.tree.leaves(state.opt_state)
        if leaf.sharding.memory_kind == "pinned_host"
    ]
    wanted = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(moments).itemsize
        for leaf in on_host
    )
    assert memory.host_argument_size_in_bytes >= wanted
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    assert memory.host_temp_size_in_bytes == 0


@pytest.mark.parametrize(
    "optimizer", [AdamWConfig(), SMALL, LionConfig()], ids=["adamw", "small", "lion"]
)
def test_the_formula_of_moment_bytes_is_what_the_state_holds(optimizer):
    mesh = make_mesh(ONE, jax.devices()[:1])
    _, params = abstract_model(MODEL, EXECUTION, mesh)
    transform = make_optimizer(optimizer, make_schedule(SCHEDULE, STEPS))
    state = abstract_state(params, transform, jax.random.key(0)).opt_state
    held = {"device": 0, "pinned_host": 0}
    for leaf in jax.tree.leaves(state):
        if leaf.ndim:
            kind = leaf.sharding.memory_kind or "device"
            held[kind] += leaf.size * leaf.dtype.itemsize
    assert optimizer_bytes(MODEL, optimizer) == (held["device"], held["pinned_host"])
