"""Which attention kernels a compiled TPU program calls: a silent fallback has none."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_models import CONFIG

from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.models.cache import init_cache
from llama_jax.models.init import abstract_model
from llama_jax.sharding.mesh import make_mesh
from llama_jax.sharding.rules import batch_sharding

# Two layers in one scanned loop; heads of 64 fill half of what the matrix units take.
MODEL = dataclasses.replace(
    CONFIG, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, max_seq_len=256
)
MESH = MeshConfig(fsdp=2, tensor=2)


@functools.cache
def described(topology):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def kernels(text):
    """How often each attention kernel stands in a program: in a loop over layers, once a layer."""
    calls = text.split('custom_call_target="tpu_custom_call"')[1:]
    names = [re.search(r'op_name="([^"]*)"', call)[1] for call in calls]
    forward = sum("splash_mqa_fwd" in name for name in names)
    backward = sum("splash_mqa_dkv" in name for name in names)
    return {"forward": forward, "backward": backward, "others": len(names) - forward - backward}


def arrays(mesh, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))


def gradient_text(topology, execution, mesh_config=MESH, T=200):
    """The compiled gradient of the layers' output, for rows of T tokens."""
    mesh = make_mesh(mesh_config, described(topology))
    with jax.set_mesh(mesh):
        graphdef, params = abstract_model(MODEL, execution, mesh)

        def loss(params, tokens_BT, positions_BT, segment_ids_BT):
            model = nnx.merge(graphdef, params)
            ids = {"positions_BT": positions_BT, "segment_ids_BT": segment_ids_BT}
            return model.hidden(tokens_BT, **ids).astype(jnp.float32).sum()

        step = jax.jit(jax.grad(loss))
        return step.lower(params, *[arrays(mesh, 4, T)] * 3).compile().as_text()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_layer_runs_one_kernel_forward_and_one_back(topology):
    # Attention is kept, with what its backward pass needs: its kernel isn't run again for it.
    text = gradient_text(topology, ExecutionConfig(remat="dots"))
    assert kernels(text) == {"forward": 1, "backward": 1, "others": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "forward"), [("full", 2), ("attention", 1), ("block", 1), ("none", 1)]
)
def test_only_full_rematerialisation_runs_it_again(remat, forward):
    text = gradient_text("v5e:2x2", ExecutionConfig(remat=remat))
    assert kernels(text) == {"forward": forward, "backward": 1, "others": 0}


@pytest.mark.slow
def test_on_the_context_axis_each_device_runs_it_over_its_two_chunks():
    text = gradient_text("v5e:2x2", ExecutionConfig(), MeshConfig(fsdp=2, context=2), T=256)
    assert kernels(text) == {"forward": 1, "backward": 1, "others": 0}


@pytest.mark.slow
def test_a_prompt_runs_it_forward_and_a_named_backend_runs_none():
    mesh = make_mesh(MESH, described("v5e:2x2"))

    def text_of(execution):
        with jax.set_mesh(mesh):
            graphdef, params = abstract_model(MODEL, execution, mesh)

            def prefill(params, tokens_BT, positions_BT, segment_ids_BT):
                cache = init_cache(MODEL, 4, 256, "bfloat16", stacked=True)
                ids = {"positions_BT": positions_BT, "segment_ids_BT": segment_ids_BT}
                model = nnx.merge(graphdef, params)
                return model.extend(tokens_BT, cache, **ids, fresh=True)

            lowered = jax.jit(prefill).lower(params, *[arrays(mesh, 4, 128)] * 3)
            return lowered.compile().as_text()

    assert kernels(text_of(ExecutionConfig())) == {"forward": 1, "backward": 0, "others": 0}
    text = text_of(ExecutionConfig(attention="blockwise"))
    assert kernels(text) == {"forward": 0, "backward": 0, "others": 0}
