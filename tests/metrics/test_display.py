"""What is drawn and printed: progress lines, plots, the W&B error, compressors."""

import io
import math
import subprocess
import sys
import types

import pytest
from rich.console import Console

from llama_jax.config.loading import ConfigError
from llama_jax.metrics.compression import bits_per_byte, compressed_bits_per_byte
from llama_jax.metrics.plots import plot_loss, series, smooth
from llama_jax.metrics.progress import (
    TrainingProgress,
    format_bytes,
    format_count,
    format_duration,
)
from llama_jax.metrics.wandb import WandbWriter


def show(steps, **kwargs):
    text = io.StringIO()
    console = Console(file=text, width=100, **kwargs)
    with TrainingProgress(console, steps[-1], 0, enabled=True) as progress:
        for step in steps:
            progress.update(step, loss=2.5, tokens_per_s=12345.0, mfu=0.401, step_s=2.0)
    return text.getvalue()


def test_a_log_file_gets_the_first_and_the_last_line_not_one_a_step():
    lines = show(range(1, 101)).splitlines()
    assert lines == [
        "step 1/100 · loss 2.5000 · 12.3k tokens/s · MFU 40.1% · 3m18s left",
        "step 100/100 · loss 2.5000 · 12.3k tokens/s · MFU 40.1% · 0s left",
    ]


def test_a_terminal_gets_a_bar_with_the_same_figures():
    shown = show(range(1, 101), force_terminal=True)
    assert "100/100" in shown
    assert "loss 2.5000 · 12.3k tokens/s · MFU 40.1% · 0s left" in shown


def test_an_unknown_mfu_is_left_out_and_a_disabled_bar_says_nothing():
    text = io.StringIO()
    for enabled in (True, False):
        with TrainingProgress(Console(file=text), 1, 0, enabled=enabled) as progress:
            progress.update(1, loss=1.0, tokens_per_s=1.0, mfu=None, step_s=1.0)
    assert text.getvalue() == "step 1/1 · loss 1.0000 · 1 tokens/s · 0s left\n"


def test_figures_are_short():
    assert [format_duration(s) for s in (0.4, 59.6, 185, 7620, 356400)] == [
        "0s", "1m00s", "3m05s", "2h07m", "4d03h",
    ]  # fmt: skip
    assert [format_count(n) for n in (950, 1000, 12345, 4.56e6, 8.03e9)] == [
        "950", "1.00k", "12.3k", "4.56M", "8.03B",
    ]  # fmt: skip
    assert [format_bytes(n) for n in (512, 1536, 2.5 * 2**30)] == ["512 B", "1.5 KiB", "2.5 GiB"]


def test_the_plot_is_a_png_and_leaves_out_what_is_not_finite(tmp_path):
    records = [{"step": s, "loss": 5.0 / s, "learning_rate": 1e-3} for s in range(1, 9)]
    records += [{"step": 9, "loss": "nan"}, {"step": 9, "held_out": {"loss": 1.0}}]
    assert series(records, "loss")[0] == list(range(1, 9))
    plot_loss(records, tmp_path / "plots" / "loss.png", "a run")
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([4.0]) == pytest.approx([4.0])
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 0.5 / 0.75])


def test_wandb_without_its_package_is_one_line_that_names_the_key(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"^metrics\.wandb_project: .*isn't installed"):
        WandbWriter("project", "run", {})


def test_wandb_gets_the_scalars_by_step_under_an_id_that_a_restart_shares(monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda scalars, step: calls.append((step, scalars)),
        finish=lambda: calls.append("finish"),
    )
    fake = types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = WandbWriter("project", "run", {"seed": 1})
    writer.write(3, {"loss": 2.0})
    writer.close()
    assert (calls[0]["project"], calls[0]["id"], calls[0]["resume"]) == ("project", "run", "allow")
    assert calls[1:] == [(3, {"loss": 2.0}), "finish"]


def test_bits_a_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), tokens=1000, text_bytes=1000) == pytest.approx(8.0)
    # Two bytes a token at 4 bits a token.
    assert bits_per_byte(math.log(16), tokens=500, text_bytes=1000) == pytest.approx(2.0)


def test_the_compressors_give_what_the_command_line_tools_give():
    texts = ["def f(x):\n    return x\n" * 40, "class A:\n    pass\n" * 60, "naïve\n" * 9]
    data = "".join(texts).encode()
    found = compressed_bits_per_byte(texts)
    for command in ("gzip", "xz"):
        try:
            out = subprocess.run([command, "-9c"], input=data, capture_output=True, check=True)
        except FileNotFoundError:
            pytest.skip(f"no {command}")
        assert found[f"{command} -9"] == pytest.approx(8 * len(out.stdout) / len(data), rel=0.02)
    with pytest.raises(ValueError, match="no held-out text"):
        compressed_bits_per_byte([])
