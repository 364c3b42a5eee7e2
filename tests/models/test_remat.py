"""What each policy keeps, to the byte, and where; offloading runs here and compiles for TPUs."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from jax.experimental import topologies
from tiny_models import CONFIG, F32, make, packed_batch, whole_batch

from llama_jax.config.loading import ConfigError, from_table
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.models.init import abstract_model
from llama_jax.models.llama import Llama
from llama_jax.models.remat import PRESETS, offloaded_names, saved_names, token_widths
from llama_jax.sharding.mesh import make_mesh
from llama_jax.sharding.rules import batch_sharding

B, T = 2, 16
FULL = dataclasses.replace(F32, remat="full")
NAMES = tuple(token_widths(CONFIG))


def kept(execution):
    """Types of the stacked arrays that the forward pass keeps for the backward pass."""
    graphdef, params = nnx.split(Llama(CONFIG, execution, rngs=nnx.Rngs(0)))
    batch = jax.tree.map(jnp.asarray, whole_batch(B, T))

    def forward(params):
        return tiny_models.forward(nnx.merge(graphdef, params), batch).sum()

    types = jax.make_jaxpr(lambda params: jax.vjp(forward, params)[1])(params).out_avals
    return [t for t in types if t.ndim > 2 and t.shape[0] == CONFIG.num_layers]


def kept_bytes(execution):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept(execution))


@pytest.mark.parametrize("attention", ["reference", "blockwise"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_a_saved_tensor_costs_its_own_bytes_once(name, attention):
    execution = dataclasses.replace(FULL, attention=attention)
    more = kept_bytes(dataclasses.replace(execution, remat_save=(name,))) - kept_bytes(execution)
    tokens = CONFIG.num_layers * B * (128 if (name, attention) == ("attention", "blockwise") else T)
    log_sum_exp = tokens * CONFIG.num_heads if tokens != CONFIG.num_layers * B * T else 0
    assert more == 4 * (tokens * token_widths(CONFIG)[name] + log_sum_exp)


def test_the_layer_input_is_kept_once_however_it_is_asked_for():
    asked = kept_bytes(dataclasses.replace(FULL, remat_save=("layer_input",)))
    assert asked == kept_bytes(FULL)


def test_a_preset_keeps_its_tensors_and_those_added_to_it():
    execution = dataclasses.replace(F32, remat="block", remat_save=("swiglu",))
    assert saved_names(execution) == ("layer_input", "q", "k", "v", "attention", "swiglu")
    widths = token_widths(CONFIG)
    wanted = sum(widths[name] for name in saved_names(execution)[1:])
    more = kept_bytes(execution) - kept_bytes(FULL)
    assert more == 4 * CONFIG.num_layers * B * T * wanted
    assert kept_bytes(dataclasses.replace(F32, remat="none")) > kept_bytes(
        dataclasses.replace(F32, remat="dots")
    )


def test_presets_go_from_all_to_the_input_alone():
    order = [set(NAMES), *(set(saved_names(ExecutionConfig(remat=name))) for name in PRESETS)]
    assert all(less < more for more, less in itertools.pairwise(order))
    assert order[-1] == {"layer_input"}


@pytest.mark.short
def test_what_cannot_be_meant_is_one_line():
    for table, message in (
        ({"remat_save": ["gate_prj"]}, r"remat_save\.0: .*did you mean 'gate_proj'"),
        ({"remat_offload": ["queries"], "remat": "full"}, r"remat_offload\.0: unknown value"),
        ({"remat_save": ["q"], "remat": "none"}, "remat_save: has no meaning for remat 'none'"),
        ({"remat_save": ["q"], "remat_offload": ["q"]}, "remat_offload: 'q' is in remat_save too"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_table(ExecutionConfig, table, "run.toml")


OFFLOAD = dataclasses.replace(FULL, remat="block", remat_offload=("layer_input", "q", "gate_proj"))


def test_offloaded_tensors_lie_in_host_memory_and_the_rest_does_not():
    assert offloaded_names(OFFLOAD) == ("layer_input", "q", "gate_proj")
    assert saved_names(OFFLOAD) == ("k", "v", "attention")
    on_host = [t.shape[3:] for t in kept(OFFLOAD) if t.memory_space == jax.memory.Space.Host]
    assert sorted(on_host) == [(8, 16), (32,), (48,)]
    assert kept_bytes(OFFLOAD) == kept_bytes(
        dataclasses.replace(FULL, remat="block", remat_save=("gate_proj",))
    )


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scan", "loop"])
def test_offloading_changes_no_loss_and_no_gradient(scan_layers):
    batch = packed_batch(B, T)
    execution = dataclasses.replace(OFFLOAD, scan_layers=scan_layers)
    wanted, wanted_grads = tiny_models.loss_and_grads(*make(execution=FULL), batch)
    got, grads = tiny_models.loss_and_grads(*make(execution=execution), batch)
    assert got == pytest.approx(wanted, rel=1e-6)
    for name, grad in grads.items():
        scale = np.abs(wanted_grads[name]).max()
        np.testing.assert_allclose(grad, wanted_grads[name], atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_on_a_tpu_exactly_the_offloaded_bytes_are_the_hosts(topology):
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = dataclasses.replace(
        CONFIG, embed_dim=256, num_heads=2, num_kv_heads=1, head_dim=128, mlp_dim=512, num_layers=4
    )
    execution = ExecutionConfig(remat="full", remat_offload=("layer_input", "gate_proj"))
    compiled = compile_gradient(config, execution, make_mesh(MeshConfig(), devices), T=64)
    a_layer = 64 * (256 + 512) * 2  # a sequence on each device, in bfloat16
    assert compiled.memory_analysis().host_temp_size_in_bytes == 4 * a_layer
    # The stacks of all layers are allocated in host memory, space 5, never on the device.
    for width in (256, 512):
        stacks = re.findall(rf"bf16\[4,1,64,{width}\]{{[^}}]*}}", compiled.as_text())
        assert stacks
        assert all("S(5)" in stack for stack in stacks), stacks
    # Weights are cast a layer at a time: no bfloat16 copy of all layers' is kept on the side.
    assert "f32[4,64,512]" in compiled.as_text()
    assert "bf16[4,64,512]" not in compiled.as_text()


def compile_gradient(config, execution, mesh, T):
    with jax.set_mesh(mesh):
        graphdef, params = abstract_model(config, execution, mesh)
        sharding = batch_sharding(mesh)
        batch = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
            whole_batch(mesh.size, T),
        )

        def loss(params, batch):
            model = nnx.merge(graphdef, params)
            return tiny_models.forward(model, batch).sum()

        return jax.jit(jax.grad(loss)).lower(params, batch).compile()
