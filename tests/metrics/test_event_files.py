"""TensorBoard's own reader gets back what was written."""

import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_jax.metrics.event_files import EventFileWriter


def read(directory, tag):
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


@pytest.mark.slow
def test_tensorboard_reads_the_scalars_and_the_text(tmp_path):
    writer = EventFileWriter(tmp_path, 0)
    writer.write(1, {"train/loss": 4.5, "train/rate": 0.25})
    writer.write(2, {"train/loss": 3.5})
    writer.write_text(2, "samples", "def f():")
    writer.close()
    assert read(tmp_path, "train/loss") == [(1, 4.5), (2, 3.5)]
    assert read(tmp_path, "train/rate") == [(1, 0.25)]
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (text,) = accumulator.Tensors("samples")
    assert text.tensor_proto.string_val[0] == b"def f():"


def test_after_a_restart_tensorboard_shows_no_step_twice(tmp_path):
    first = EventFileWriter(tmp_path, 0)
    for step in range(1, 6):
        first.write(step, {"loss": float(step)})
    first.close()
    second = EventFileWriter(tmp_path, 3)
    for step in range(4, 7):
        second.write(step, {"loss": 10.0 * step})
    second.close()
    assert read(tmp_path, "loss") == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0),
    ]  # fmt: skip


def test_writing_events_loads_neither_tensorflow_nor_torch(tmp_path):
    code = (
        "import sys; from llama_jax.metrics.event_files import EventFileWriter;"
        f"EventFileWriter({str(tmp_path)!r}, 0).close();"
        "assert not {'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
