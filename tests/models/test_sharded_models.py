"""Sharded = unsharded on every mesh of eight, and the layouts that it rests on."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_models
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded_cases import CASES
from tiny_models import CONFIG, F32, TIED, make, packed_batch, params_of

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig
from llama_jax.models.init import abstract_model
from llama_jax.sharding.mesh import AXES
from llama_jax.sharding.rules import param_spec

TOLERANCE = 3e-6  # relative to the largest value: float32 sums in another order


@functools.cache
def unsharded(config):
    model, mesh = make(config)
    return params_of(model), *tiny_models.logits_loss_grads(model, mesh, packed_batch(8, 16))


def close(got, wanted, name):
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE * np.abs(wanted).max(), err_msg=name)


# The loss and its gradients on every mesh are the training step's test; here the logits, by the
# reference and by blocks, whose own types differ between shards.
LOGITS_CASES = [
    ("fsdp 8", "reference"),
    ("tensor 4, over the 2 kv heads", "blockwise"),
    ("tensor 8, over the 2 kv heads", "reference"),
    ("fsdp 2 x context 4, ring", "blockwise"),
    ("data 2 x context 2 x tensor 2", "reference"),
    ("data 8", "reference"),
    ("fsdp 4 x context 2", "reference"),
    ("context 8", "reference"),
]


@pytest.mark.parametrize(("name", "attention"), LOGITS_CASES)
def test_logits_loss_and_gradients_are_those_of_one_device(name, attention):
    config = TIED if attention == "blockwise" else CONFIG
    case = CASES[name]
    params, logits, loss, grads = unsharded(config)
    execution = dataclasses.replace(F32, attention=attention, context_attention=case.context)
    model, mesh = make(config, execution, case.mesh, devices=8)
    for key, value in params_of(model).items():
        np.testing.assert_array_equal(value, params[key], err_msg=key)  # same initial weights
    batch = packed_batch(8, 16)
    got_logits, got_loss, got_grads = tiny_models.logits_loss_grads(model, mesh, batch)
    real_BT = batch["segment_ids"] != 0
    close(got_logits[real_BT], logits[real_BT], "logits")
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert got_grads.keys() == grads.keys()
    for key, grad in grads.items():
        close(got_grads[key], grad, key)


@pytest.mark.parametrize("devices", [2, 4])
def test_initial_weights_are_the_same_on_fewer_devices(devices):
    params = unsharded(CONFIG)[0]
    for mesh in (MeshConfig(), MeshConfig(fsdp=1, tensor=devices)):
        model, _ = make(mesh=mesh, devices=devices)
        for key, value in params_of(model).items():
            np.testing.assert_array_equal(value, params[key], err_msg=key)


def test_parameters_lie_by_the_table_and_gradients_like_them():
    model, mesh = make(mesh=MeshConfig(fsdp=2, tensor=4), devices=8)
    graphdef, params = nnx.split(model)
    batch = packed_batch(8, 16)
    with jax.set_mesh(mesh):
        grads = jax.jit(
            jax.grad(lambda p: tiny_models.forward(nnx.merge(graphdef, p), batch).sum())
        )(params)
    for state in (params, grads):
        specs = {
            ".".join(map(str, path)): leaf[...].sharding.spec
            for path, leaf in nnx.to_flat_state(state)
        }
        assert specs == {
            "embedding": P("tensor", "fsdp"),
            "lm_head": P("fsdp", "tensor"),
            "final_norm.scale": P(None),
            "layers.attn_norm.scale": P(None, None),
            "layers.mlp_norm.scale": P(None, None),
            "layers.attention.q_proj": P(None, "fsdp", "tensor", None),
            "layers.attention.k_proj": P(None, "fsdp", None, None),
            "layers.attention.v_proj": P(None, "fsdp", None, None),
            "layers.attention.o_proj": P(None, "tensor", None, "fsdp"),
            "layers.mlp.gate_proj": P(None, "fsdp", "tensor"),
            "layers.mlp.up_proj": P(None, "fsdp", "tensor"),
            "layers.mlp.down_proj": P(None, "tensor", "fsdp"),
        }


def test_abstract_models_have_the_real_shapes_dtypes_and_shardings_without_memory():
    execution = dataclasses.replace(F32, param_dtype="bfloat16")
    mesh_config = MeshConfig(data=2, fsdp=2, tensor=2)
    model, mesh = make(CONFIG, execution, mesh_config, devices=8)
    graphdef, abstract = abstract_model(CONFIG, execution, mesh)
    real_graphdef, real = nnx.split(model)
    assert graphdef == real_graphdef
    pairs = zip(nnx.to_flat_state(abstract), nnx.to_flat_state(real), strict=True)
    for (path, a), (same_path, b) in pairs:
        assert path == same_path
        assert isinstance(a.get_value(), jax.ShapeDtypeStruct)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.get_value().sharding == b.get_value().sharding


def test_heads_that_the_tensor_axis_does_not_divide_are_refused_by_name():
    config = dataclasses.replace(CONFIG, num_heads=6)
    with pytest.raises(ConfigError, match=r"q_proj: dim 'q_heads' has size 6, .* tensor of 4"):
        make(config, mesh=MeshConfig(fsdp=2, tensor=4), devices=8)


def test_eight_kv_heads_on_a_16_way_tensor_axis_are_whole_on_every_device():
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 16), AXES, (AxisType.Explicit,) * 4)
    assert param_spec(("embed", "kv_heads", "head_dim"), (64, 8, 4), mesh, "k") == P(
        "fsdp", None, None
    )
