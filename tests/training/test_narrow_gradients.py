"""Gradients kept in the compute dtype between backward pass and update: the same, but smaller."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llama import ONE, make_batch, make_trainer, place, to_numpy

from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.models.narrow import CAST_AT_USE, Narrow, stand_ins

LOW = ExecutionConfig(compute_dtype="bfloat16", loss_chunk_size=16, remat="full")


@pytest.mark.parametrize("mesh", [ONE, MeshConfig(fsdp=2, tensor=2)])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_updates_are_those_of_float32_gradients_bit_for_bit(mesh, microbatches):
    narrow, wide = (
        make_trainer(mesh, execution=LOW, microbatches=microbatches, gradient_dtype=dtype)
        for dtype in ("bfloat16", "float32")
    )
    batches = [make_batch(seed) for seed in range(2)]
    assert narrow.train(batches) == wide.train(batches)
    jax.tree.map(
        np.testing.assert_array_equal,
        to_numpy(narrow.state.params),
        to_numpy(wide.state.params),
    )


def test_matrices_have_their_gradient_in_the_compute_dtype_and_nothing_else_has():
    trainer = make_trainer(execution=LOW)
    differentiated, join = stand_ins(trainer.state.params, "bfloat16")

    def loss_of(leaves, batch):
        model = nnx.merge(trainer.graphdef, join(leaves))
        assert isinstance(model.layers.mlp.up_proj[...], Narrow)
        return trainer.objective(model, batch, jax.random.key(0), {})[0]

    with jax.set_mesh(trainer.mesh):
        grads = jax.eval_shape(
            jax.grad(loss_of), differentiated, place(make_batch(0), trainer.mesh)
        )
    for path, grad in nnx.to_flat_state(grads):
        expected = jnp.bfloat16 if path[-1] in CAST_AT_USE else jnp.float32
        assert grad.dtype == expected, path
    assert {str(path[-1]) for path, _ in nnx.to_flat_state(grads)} >= CAST_AT_USE - {"lm_head"}


def test_where_parameters_are_in_the_compute_dtype_nothing_stands_in():
    trainer = make_trainer(execution=dataclasses.replace(LOW, compute_dtype="float32"))
    differentiated, join = stand_ins(trainer.state.params, "float32")
    for tree in (differentiated, join(differentiated)):
        same = jax.tree.map(lambda a, b: a is b, tree, trainer.state.params)
        assert all(jax.tree.leaves(same))
