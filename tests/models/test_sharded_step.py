"""A training step on every mesh of the table: the loss and gradients of one device, microbatches
and all; and the same program, somewhat larger, compiled for TPUs."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
import tiny_models
from flax import nnx
from jax.experimental import topologies
from sharded_cases import CASES
from tiny_models import CONFIG, F32, TIED, make, params_of

from llama_jax.config.hardware import find_slice
from llama_jax.config.loading import ConfigError
from llama_jax.config.run import ExecutionConfig, MeshConfig, NextTokenConfig, TrainingConfig
from llama_jax.data.device import to_device
from llama_jax.data.rows import FIELDS
from llama_jax.models.init import abstract_model
from llama_jax.objectives.objective import make_objective
from llama_jax.planning.collectives import Layout
from llama_jax.planning.program import analyze
from llama_jax.sharding.mesh import make_mesh
from llama_jax.sharding.rules import batch_sharding
from llama_jax.training.networks import Networks
from llama_jax.training.state import abstract_state, init_state
from llama_jax.training.step import make_train_step

TOLERANCE = 5e-6  # relative to the largest value: float32 sums in another order
# New parameters are the old ones less the gradient.
DESCENT = optax.scale_by_schedule(lambda count: -1.0)
TRAINING = TrainingConfig(steps=1, microbatches=2, clip_norm=None)
# Exact kernels of blocks, whose types on shards are the strictest; chunks that don't divide.
EXECUTION = dataclasses.replace(F32, attention="blockwise", loss_chunk_size=13)


def batch_of(B, T):
    batch = tiny_models.packed_batch(B, T)
    rng = np.random.default_rng(1)
    targets_BT = rng.integers(0, CONFIG.vocab_size, (B, T)).astype(np.int32)
    return {**batch, "targets": targets_BT, "loss_mask": (batch["segment_ids"] > 0).astype("f4")}


def gradients(config, execution, mesh_config=None, devices=1, T=16):
    """Loss, and gradients of the mean loss by path, through one step of descent."""
    model, mesh = make(config, execution, mesh_config, devices)
    before = params_of(model)
    objective = make_objective(NextTokenConfig(z_loss=0.01), execution)
    step = make_train_step(
        Networks(nnx.graphdef(model)), objective, DESCENT, lambda count: 1.0, TRAINING
    )
    with jax.set_mesh(mesh):
        state = init_state(nnx.state(model), DESCENT, jax.random.key(0))
        state, metrics = step(state, to_device(batch_of(16, T), mesh))
    nnx.update(model, state.params)
    after = params_of(model)
    return float(metrics["loss"]), {name: before[name] - after[name] for name in before}


@functools.cache
def unsharded(config):
    return gradients(config, dataclasses.replace(EXECUTION, attention="reference"))


# Those that hold all kinds of layout at least once; the others take much longer.
QUICK = {
    "tensor 4, over the 2 kv heads",
    "context 8, ring",
    "data 2 x context 2 x tensor 2, ring",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_a_step_in_two_microbatches_is_that_of_one_device(name):
    case = CASES[name]
    config = TIED if case.context == "ring" else CONFIG
    execution = dataclasses.replace(EXECUTION, context_attention=case.context)
    loss, grads = unsharded(config)
    got_loss, got_grads = gradients(config, execution, case.mesh, devices=8)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    for key, grad in grads.items():
        # What is compared is the difference of two parameters of order 1.
        tolerance = TOLERANCE * np.abs(grad).max() + 2e-7
        np.testing.assert_allclose(got_grads[key], grad, atol=tolerance, err_msg=key)


def test_columns_of_whole_registers_are_looked_up_where_they_are_stored():
    """Wide enough that the embedding isn't gathered; the other cases are too narrow for that."""
    config = dataclasses.replace(CONFIG, embed_dim=256, num_layers=1, init_std=0.05)
    loss, grads = gradients(config, EXECUTION)
    got_loss, got_grads = gradients(
        config, EXECUTION, MeshConfig(data=2, fsdp=2, tensor=2), devices=8
    )
    assert got_loss == pytest.approx(loss, rel=1e-6)
    for key, grad in grads.items():
        tolerance = TOLERANCE * np.abs(grad).max() + 2e-7
        np.testing.assert_allclose(got_grads[key], grad, atol=tolerance, err_msg=key)


def test_a_row_that_the_zigzag_order_does_not_cut_is_refused_with_what_fits():
    with pytest.raises(ConfigError, match=r"^mesh\.context: a row of 24 .* 16 chunks .* of 16 fit"):
        gradients(CONFIG, EXECUTION, MeshConfig(fsdp=1, context=8), devices=8, T=24)


# For TPUs: heads of a whole register, rows long enough for the kernel's blocks on each shard.
LARGE = dataclasses.replace(
    CONFIG,
    vocab_size=1024,
    embed_dim=256,
    head_dim=128,
    mlp_dim=1024,
    max_seq_len=2048,
)
LENGTH = 1024


@functools.cache
def program(name):
    """The compiled text of the whole step for the case's slice."""
    pytest.importorskip("libtpu")
    case = CASES[name]
    options = {"num_slices": case.num_slices} if case.num_slices > 1 else {}
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=case.topology, **options
    ).devices
    mesh = make_mesh(case.mesh, devices)
    execution = ExecutionConfig(remat="attention", context_attention=case.context)
    graphdef, params = abstract_model(LARGE, execution, mesh)
    objective = make_objective(NextTokenConfig(), execution)
    step = make_train_step(Networks(graphdef), objective, DESCENT, lambda count: 1.0, TRAINING)
    with jax.set_mesh(mesh):
        state = abstract_state(params, DESCENT, jax.eval_shape(lambda: jax.random.key(0)))
        batch = {
            name: jax.ShapeDtypeStruct((16, LENGTH), dtype, sharding=batch_sharding(mesh))
            for name, dtype in FIELDS.items()
        }
        return step.lower(state, batch).compile().as_text()


def kernel_calls(name):
    """Attention kernels that one device runs in a step, by the trip counts of their loops."""
    case = CASES[name]
    layout = Layout(dataclasses.asdict(case.mesh))
    calls = analyze(program(name), find_slice(case.topology).chip, layout).kernel_calls
    return sum(calls.values())


def check_program(name):
    case, text = CASES[name], program(name)
    ring = case.context == "ring"
    # Each layer's and microbatch's forward and backward once, as attention's output is kept; in a
    # ring for each shard of the keys. (Of the calls in the text the compiler may peel off more.)
    times = LARGE.num_layers * TRAINING.microbatches * (case.mesh.context if ring else 1)
    assert kernel_calls(name) == 2 * times
    assert ("collective-permute" in text) == ring
    tensor, rows = case.mesh.tensor, LENGTH // case.mesh.context
    if tensor > 1:
        # Activations come out of a product as reduce-scatters: one for each of o and down, and
        # backward for each of attention and MLP.
        assert len(re.findall(r"^%all-reduce-scatter|reduce-scatter\(", text, re.M)) >= 4
        assert not whole_sums(text, rf"(bf16|f32)\[(\d+,)?{rows},{LARGE.embed_dim}\]")


def whole_sums(text, shape):
    """All-reduces of the shape whose result stays whole; a fusion named so keeps a part of it."""
    found, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line:
            computation = line
        if re.search(rf"= {shape}\S* all-reduce\(", line) and "reduce-scatter" not in computation:
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "tensor 2"])
def test_a_step_compiles_for_tpus(name):
    check_program(name)


def test_a_step_with_a_tensor_axis_compiles_for_tpus():
    check_program("tensor 2")
