"""The doctor finds what is known to go wrong silently."""

import os

import jax
import pytest

from llama_jax.training import diagnosis
from llama_jax.training.environment import (
    PlatformError,
    describe_devices,
    enable_compilation_cache,
    git_state,
    select_platform,
    versions,
)


def make_device_file(root, name):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize(
    ("name", "what"),
    [("dev/nvidia0", "an NVIDIA GPU"), ("dev/accel0", "a TPU"), ("dev/vfio/0", "a TPU")],
)
def test_a_cpu_beside_an_accelerator_is_a_finding(tmp_path, monkeypatch, name, what):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    make_device_file(tmp_path, name)
    finding = diagnosis.unused_accelerator("cpu", tmp_path)
    assert finding.startswith(f"this machine has {what}, but JAX fell back to the CPU")
    assert diagnosis.unused_accelerator("tpu", tmp_path) is None
    # Asked for by name, the CPU is no fallback.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert diagnosis.unused_accelerator("cpu", tmp_path) is None


def test_a_machine_without_accelerator_is_fine_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    make_device_file(tmp_path, "dev/nvidiactl")
    make_device_file(tmp_path, "dev/vfio/vfio")
    assert diagnosis.unused_accelerator("cpu", tmp_path) is None


def test_a_device_count_set_after_jax_started_is_a_finding(monkeypatch):
    assert jax.device_count() == 8
    assert diagnosis.late_xla_flags() is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert diagnosis.late_xla_flags().startswith(
        "XLA_FLAGS asks for 4 CPU devices and there are 8: it was set after JAX had started"
    )


def test_the_facts_hold_devices_memory_versions_and_the_precision_of_a_product():
    facts = diagnosis.facts()
    assert len(facts["devices"]) == 8
    assert facts["host"]["memory_bytes"] > 2**30
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["settings"]["matmul_precision"] == "float32"


def test_a_platform_that_is_not_there_is_one_line_with_a_hint():
    with pytest.raises(PlatformError) as error:
        select_platform("tpu")
    jax.config.update("jax_platforms", "cpu")
    assert str(error.value).startswith("platform 'tpu' was asked for and isn't there: ")
    assert "libtpu" in str(error.value)
    assert "\n" not in str(error.value)
    select_platform("cpu")


def test_the_start_up_line_names_platform_count_and_kind():
    assert describe_devices() == f"cpu, 8 devices (cpu), 1 process, jax {jax.__version__}"


def test_the_compilation_cache_is_on_and_can_be_moved_or_turned_off():
    assert enable_compilation_cache() == os.environ["JAX_COMPILATION_CACHE_DIR"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert enable_compilation_cache() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_versions_and_git_state_are_known():
    assert {"python", "llama-jax", "jax", "flax", "numpy"} <= versions().keys()
    state = git_state()
    assert state is None or len(state["commit"]) == 40
