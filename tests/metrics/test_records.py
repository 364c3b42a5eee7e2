"""metrics.jsonl after any interruption: no step twice, none lost, every line JSON."""

import json
import math

import pytest

from llama_jax.metrics.records import RecordWriter, read_records

pytestmark = pytest.mark.short


def write_steps(path, from_step, steps):
    writer = RecordWriter(path, from_step)
    for step in steps:
        writer.write(step, {"loss": float(step)})
    writer.close()


def test_a_resumed_run_has_each_step_once_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, range(1, 11))
    write_steps(path, 6, range(7, 13))
    assert [record["step"] for record in read_records(path)] == list(range(1, 13))


def test_a_run_that_starts_anew_leaves_nothing_of_the_old_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, range(1, 4))
    write_steps(path, 0, [1])
    assert [record["step"] for record in read_records(path)] == [1]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_last_line_cut_anywhere_is_dropped_and_written_anew(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, [1, 2])
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    assert cut < len(last)
    path.write_bytes(whole[:-cut])
    # Without its newline alone the last line is still whole.
    assert [r["step"] for r in read_records(path)] == ([1, 2] if cut == 1 else [1])
    write_steps(path, 2, [3])
    assert [r["step"] for r in read_records(path)] == ([1, 2, 3] if cut == 1 else [1, 3])
    assert path.read_bytes().count(b"\n") == len(read_records(path))


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        read_records(path)


def test_records_are_on_disk_after_a_flush(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = RecordWriter(path, 0)
    writer.write(1, {"loss": 2.5, "held_out": {"loss": 1.5}})
    writer.flush()
    assert path.read_text() == '{"step": 1, "loss": 2.5, "held_out": {"loss": 1.5}}\n'
    writer.close()


def test_a_loss_that_is_not_finite_is_still_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = RecordWriter(path, 0)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf})
    writer.close()
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert math.isnan(float(record["loss"]))
    assert float(record["grad_norm"]) == math.inf
