"""Throughput, MFU and goodput against figures worked out by hand."""

import types

import pytest

from llama_jax.metrics.throughput import (
    Goodput,
    Rate,
    model_flops_utilization,
)


def devices(kind, count):
    return [types.SimpleNamespace(device_kind=kind)] * count


def test_mfu_is_the_models_flops_over_the_peak_of_all_devices():
    # 16 v5e at 197 TFLOP/s; 1e5 tokens/s at 6 FLOPs for each of 8e9 parameters.
    mfu = model_flops_utilization(1e5, 6 * 8e9, devices("TPU v5 lite", 16))
    assert mfu == pytest.approx(4.8e15 / 3.152e15)


def test_an_unknown_device_has_no_mfu():
    assert model_flops_utilization(1e5, 1e9, devices("cpu", 8)) is None


def test_the_rate_is_of_the_last_steps_by_time_not_a_mean_of_rates():
    rate = Rate(window=2)
    assert rate.update(1000, 100.0) == 10
    assert rate.update(1000, 1.0) == pytest.approx(2000 / 101)
    # The first, slow step has left the window.
    assert rate.update(1000, 3.0) == pytest.approx(2000 / 4)
    assert rate.seconds_per_step() == 2.0


def test_the_parts_of_the_wall_time_add_up(monkeypatch):
    now = iter([10.0, 16.0, 20.0, 20.0])
    goodput = Goodput(start_s=0.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    with goodput.part("step"):
        pass
    goodput.add("save", 4.0)
    assert goodput.fraction() == 6 / 20
    assert goodput.summary() == {"step": 6.0, "save": 4.0, "other": 10.0, "total": 20.0}
