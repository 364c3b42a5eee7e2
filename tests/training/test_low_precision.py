"""Training with 8-bit products: near bfloat16's, and 8 bits in the program that a TPU runs."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from tiny_llama import EXECUTION, MODEL, SCHEDULE, STEPS, make_batch, make_trainer

from llama_jax.config.run import (
    AdamWConfig,
    MeshConfig,
    NextTokenConfig,
    TrainingConfig,
)
from llama_jax.models.init import abstract_model
from llama_jax.objectives.objective import make_objective
from llama_jax.optim.optimizer import make_optimizer
from llama_jax.optim.schedule import make_schedule
from llama_jax.sharding.mesh import make_mesh
from llama_jax.sharding.rules import batch_sharding
from llama_jax.training.networks import Networks
from llama_jax.training.state import abstract_state
from llama_jax.training.step import make_train_step

pytest.importorskip("qwix")
# How far a loss may be off, of what there was to learn.
BOUND = {"int8": 0.02, "fp8": 0.04}


def execution(precision, **more):
    more = {"compute_dtype": "bfloat16", "loss_chunk_size": 16, **more}
    return dataclasses.replace(EXECUTION, matmul_precision=precision, **more)


def losses(precision, mesh, steps=8):
    trainer = make_trainer(mesh, execution=execution(precision))
    history = trainer.train([make_batch(step % 2) for step in range(steps)])
    assert all(np.isfinite(metrics["grad_norm"]) for metrics in history)
    assert not any(metrics["skipped"] for metrics in history)
    return np.array([metrics["loss"] for metrics in history])


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_tiny_model_learns_as_in_bfloat16(precision):
    mesh = MeshConfig(1, 2, 1, 2)
    plain, low = losses("default", mesh), losses(precision, mesh)
    learnt = plain[0] - plain[-1]
    assert learnt > 0.2
    assert 0 < np.abs(low - plain).max() < BOUND[precision] * learnt


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_gradients_point_where_bfloat16s_do(precision):
    batch = jax.tree.map(np.asarray, make_batch(0))

    def gradient(name):
        trainer = make_trainer(execution=execution(name))

        def loss(params):
            model = nnx.merge(trainer.graphdef, params)
            return trainer.objective(model, batch, jax.random.key(0), {})[0]

        with jax.set_mesh(trainer.mesh):
            grads = nnx.to_flat_state(jax.jit(jax.grad(loss))(trainer.state.params))
        return {path: np.asarray(grad[...], np.float64).ravel() for path, grad in grads}

    plain, low = gradient("default"), gradient(precision)
    for path, grad in plain.items():
        cosine = grad @ low[path] / np.linalg.norm(grad) / np.linalg.norm(low[path])
        assert cosine > {"int8": 0.995, "fp8": 0.97}[precision], path


@pytest.mark.parametrize(
    ("precision", "topology", "dtypes"),
    [
        ("int8", "v5e:2x2", {"s8"}),
        pytest.param("int8", "v6e:2x2", {"s8"}, marks=pytest.mark.slow),
        pytest.param("fp8", "v5e:2x2", {"f8e4m3fn", "f8e5m2"}, marks=pytest.mark.slow),
        pytest.param("fp8", "v6e:2x2", {"f8e4m3fn", "f8e5m2"}, marks=pytest.mark.slow),
    ],
)
def test_on_a_tpu_every_product_of_a_layer_is_in_8_bits(precision, topology, dtypes):
    pytest.importorskip("libtpu")
    found = product_types(compiled_step(precision, topology))
    low = [types for types in found if set(types) <= dtypes]
    # Seven products forward and two for the gradients of each, once for all layers: a loop.
    assert len(low) == 7 + 14
    assert set().union(*low) == dtypes
    assert len(found) - len(low) == 3  # the head's


def product_types(text):
    """The operand types of each matrix product in a TPU program, which calls it a convolution."""
    dtype_of = dict(re.findall(r"%([\w.-]+) = \(?(\w+)\[", text))
    pairs = re.findall(r" convolution\(%([\w.-]+), %([\w.-]+)\)", text)
    return [(dtype_of[a], dtype_of[b]) for a, b in pairs]


def compiled_step(precision, topology):
    """The text of a step of three layers, large enough that products are not made elementwise."""
    model = dataclasses.replace(
        MODEL, embed_dim=256, num_heads=2, num_kv_heads=1, head_dim=128, mlp_dim=512,
        num_layers=3, max_seq_len=256, vocab_size=256,
    )  # fmt: skip
    low = execution(precision, loss_chunk_size=1024)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(), devices)
    schedule = make_schedule(SCHEDULE, STEPS)
    optimizer = make_optimizer(AdamWConfig(), schedule)
    objective = make_objective(NextTokenConfig(), low)
    graphdef, params = abstract_model(model, low, mesh)
    sharding = batch_sharding(mesh)
    batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        make_batch(0, rows=mesh.size, length=256),
    )
    with jax.set_mesh(mesh):
        state = abstract_state(params, optimizer, jax.eval_shape(lambda: jax.random.key(0)))
        step = make_train_step(
            Networks(graphdef), objective, optimizer, schedule, TrainingConfig(steps=STEPS)
        )
        return step.lower(state, batch).compile().as_text()
