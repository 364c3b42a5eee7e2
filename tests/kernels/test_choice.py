"""Which attention backend a device and shape get, and what a forced one is told."""

import jax
import pytest

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig
from llama_jax.kernels.choice import (
    BLOCKWISE_FROM,
    LARGEST_BIAS_BYTES,
    Device,
    Shape,
    choose_backend,
    current_device,
    describe_choice,
)
from llama_jax.sharding.mesh import make_mesh

CPU, TPU, GPU = Device("cpu", "cpu"), Device("tpu", "TPU v5 lite"), Device("gpu", "NVIDIA H100")


def shape(length, *, rows=1, head_dim=128, dtype="bfloat16"):
    return Shape(rows, length, length, head_dim, dtype)


@pytest.mark.short
def test_auto_takes_the_kernel_of_the_platform_and_on_a_cpu_blocks_for_long_rows():
    assert choose_backend("auto", shape(8192), TPU) == "splash"
    assert choose_backend("auto", shape(16), TPU) == "splash"
    assert choose_backend("auto", shape(8192), GPU) == "cudnn"
    assert choose_backend("auto", shape(BLOCKWISE_FROM), CPU) == "blockwise"
    assert choose_backend("auto", shape(BLOCKWISE_FROM - 1), CPU) == "reference"


def test_a_gpu_gets_blocks_where_cudnn_cannot_run_or_its_bias_is_too_large():
    assert choose_backend("auto", shape(4096, dtype="float32"), GPU) == "blockwise"
    assert choose_backend("auto", shape(64, dtype="float32"), GPU) == "reference"
    assert choose_backend("auto", shape(4096, head_dim=160), GPU) == "blockwise"
    assert choose_backend("auto", shape(4097), GPU) == "blockwise"
    rows = LARGEST_BIAS_BYTES // (8192 * 8192 * 2)
    assert choose_backend("auto", shape(8192, rows=rows), GPU) == "cudnn"
    assert choose_backend("auto", shape(8192, rows=rows + 1), GPU) == "blockwise"


def test_keys_that_go_round_a_ring_need_a_backend_that_has_that_form():
    assert choose_backend("auto", shape(64), CPU, ring=True) == "blockwise"
    assert choose_backend("auto", shape(4096), GPU, ring=True) == "blockwise"
    assert choose_backend("auto", shape(64), TPU, ring=True) == "splash"
    with pytest.raises(ConfigError, match="'reference' has no form that goes round a ring"):
        choose_backend("reference", shape(64), CPU, ring=True)


def test_a_backend_by_name_runs_or_is_refused_in_one_line():
    assert choose_backend("reference", shape(10**6), TPU) == "reference"
    assert choose_backend("blockwise", shape(8), GPU) == "blockwise"
    with pytest.raises(ConfigError, match=r"'splash' runs on tpu only.*are cpu \(cpu\); use auto"):
        choose_backend("splash", shape(8192), CPU)
    with pytest.raises(ConfigError, match="'cudnn' runs on gpu only"):
        choose_backend("cudnn", shape(8192), TPU)
    with pytest.raises(ConfigError, match="not float32; use auto"):
        choose_backend("cudnn", shape(8192, dtype="float32"), GPU)
    with pytest.raises(ConfigError, match="did you mean 'splash'"):
        choose_backend("splas", shape(8), CPU)


def test_the_choice_says_its_reason_and_its_cost():
    said = describe_choice("cudnn", "auto", shape(8192), GPU)
    assert said == "attention: cudnn on NVIDIA H100, packed rows by a bias of 128 MiB"
    said = describe_choice("blockwise", "auto", shape(32768, rows=2), GPU)
    assert "not cudnn: its bias for packed rows would take 4.0 GiB" in said
    assert describe_choice("splash", "auto", shape(64), TPU) == "attention: splash on TPU v5 lite"


def test_the_device_is_that_of_the_mesh_in_use_though_it_exists_only_in_a_description():
    assert current_device() == CPU
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    with jax.set_mesh(make_mesh(MeshConfig(), devices)):
        assert current_device() == TPU
        inside = []
        jax.eval_shape(jax.jit(lambda: inside.append(current_device())))
        assert inside == [TPU]
