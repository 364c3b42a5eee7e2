"""The analytic model's parts: those that are known exactly, and which way each setting moves it."""

import dataclasses

import pytest

from llama_jax.config.files import load_run_config
from llama_jax.config.hardware import find_slice
from llama_jax.models.accounting import param_count
from llama_jax.planning.analytic import memory_model, sizes_of, time_model

V5E = find_slice("v5e-16")


def run(*settings):
    return load_run_config(
        "pretrain/llama3.1-8b-v5e-16", ["data.batch_size=32", "training.microbatches=1", *settings]
    )


def memory(*settings):
    config = run(*settings)
    return memory_model(config, sizes_of(config, 16))


def time(*settings):
    config = run(*settings)
    return time_model(config, sizes_of(config, 16), V5E)


def test_state_is_split_over_fsdp_and_tensor():
    params = param_count(run().model)
    assert memory().params == 4 * params / 16
    assert memory().optimizer == 8 * params / 16
    assert memory("mesh={fsdp=8, tensor=2}").params == 4 * params / 16
    assert memory("mesh={data=4, fsdp=4}").params == 4 * params / 4


def test_full_remat_keeps_a_layers_input_and_dots_the_projections_too():
    tokens, layers = 2 * 8192, 32
    assert memory("execution.remat=full").saved_activations == layers * tokens * 4096 * 2
    widths = 4096 + (4096 + 2 * 1024) + 4096 + 4096 + 2 * 14336
    softmax = 4 * 32
    assert memory("execution.remat=dots").saved_activations == layers * tokens * (
        widths * 2 + softmax
    )
    offloaded = memory("execution.remat=full", 'execution.remat_offload=["layer_input"]')
    assert offloaded.saved_activations == 0


def test_recomputation_costs_compute_and_saves_memory():
    presets = ("none", "dots", "block", "attention", "full")
    computes = [time(f"execution.remat={preset}").compute for preset in presets]
    peaks = [memory(f"execution.remat={preset}").peak_bytes for preset in presets]
    assert computes == sorted(computes)
    assert peaks == sorted(peaks, reverse=True)


def test_model_flops_without_recomputation_are_counted_once():
    config = run("execution.remat=none")
    sizes = sizes_of(config, 16)
    # 421.6 TFLOP for 8192 tokens (docs of the peers), of which 52.8 are attention; two rows.
    matmul, attention = 2 * 368.87e12, 2 * 52.78e12
    expected = matmul / 197e12 / 0.9 + attention * (1 / 3 + 5 / 6) / 197e12 / 0.5
    assert time_model(config, sizes, V5E).compute == pytest.approx(expected, rel=2e-3)


def test_microbatches_gather_weights_more_often_and_hold_fewer_tokens():
    assert memory("training.microbatches=2").saved_activations == pytest.approx(
        memory().saved_activations / 2
    )
    assert time("training.microbatches=2").ici == pytest.approx(2 * time().ici)


def test_slices_are_joined_by_dcn_alone():
    config = run("mesh={data=2, fsdp=16}")
    one, two = sizes_of(config, 32, 1), sizes_of(config, 32, 2)
    assert time_model(config, one, V5E).dcn == 0
    assert time_model(config, two, V5E).dcn > 0
    assert time_model(config, two, V5E).ici < time_model(config, one, V5E).ici


def test_the_parts_add_up():
    found = memory()
    assert found.peak_bytes == pytest.approx(sum(dataclasses.astuple(found)))
