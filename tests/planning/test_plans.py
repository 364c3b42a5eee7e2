"""A plan's figures, its JSON, its report, what it costs, and how two of them differ."""

import dataclasses
import json

import pytest
from made_up_plans import GIB, PLAN

from llama_jax.config.files import load_run_config
from llama_jax.config.hardware import CHIPS
from llama_jax.config.loading import ConfigError
from llama_jax.planning.costs import PUBLISHED, error_seen, run_costs
from llama_jax.planning.diff import changes, diff_to_json, format_diff
from llama_jax.planning.picture import draw_plan
from llama_jax.planning.plan import from_json, read_plan, to_json
from llama_jax.planning.report import format_plan, memory_categories, scaled

pytestmark = pytest.mark.short
CONFIG = load_run_config("tiny", ["training.steps=1800", "checkpoint.every=1000"])
V5E = CHIPS["v5e"]


def costs(**options):
    return run_costs(PLAN, CONFIG, V5E, num_hosts=4, **options)


def test_speed_and_utilisation_follow_from_the_estimate():
    assert PLAN.tokens_per_s_per_chip == 16_000 / 16 / 2.0
    assert PLAN.mfu == 0.5
    assert PLAN.free_bytes == 4 * GIB
    assert PLAN.pessimistic_s == 2.25


def test_json_holds_what_the_issue_lists_and_reads_back(tmp_path):
    table = json.loads(json.dumps(to_json(PLAN)))
    wanted = (
        "topology num_chips hbm_bytes peak_bytes argument_bytes temp_bytes host_bytes model_flops "
        "executed_flops hbm_traffic_bytes collectives time_s tokens_per_s_per_chip mfu "
        "kernel_calls compile_s"
    )
    assert set(wanted.split()) <= table.keys()
    assert set(table["collectives"][0]) == {"kind", "axis", "count", "bytes", "overlapped"}
    assert {"compute", "hbm", "ici", "dcn", "estimate"} <= table["time_s"].keys()
    assert from_json(table) == PLAN
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(table))
    assert read_plan(path) == PLAN
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"plan\.json: not a plan of this version"):
        read_plan(path)


def test_the_categories_of_memory_add_up_to_the_peak():
    parts = memory_categories(PLAN)
    assert parts["everything else"] == GIB
    assert sum(parts.values()) == PLAN.peak_bytes
    # The tables hold the room of all temporaries, more than is ever in use.
    tight = dataclasses.replace(PLAN, memory={**PLAN.memory, "unused": GIB, "temporaries": 5 * GIB})
    assert memory_categories(tight)["temporaries"] == 4 * GIB
    assert "unused" not in memory_categories(tight)
    assert sum(memory_categories(tight).values()) == tight.peak_bytes
    unread = dataclasses.replace(PLAN, memory={})
    assert memory_categories(unread)["everything else"] == 6 * GIB


def test_the_whole_run_costs_steps_times_the_estimate():
    found = costs(price_per_chip_hour=1.5)
    # 1800 steps of 2 s are an hour, on 16 chips.
    assert (found.hours, found.chip_hours, found.money) == (1.0, 16.0, 24.0)
    assert (found.tokens, found.saves) == (1800 * 16_000, 2)
    # 6 GB a chip over PCIe at 15 GB/s; 24 GB a VM at 1 GB/s.
    assert (found.copy_s, found.write_s) == (0.4, 24.0)
    assert costs().money is None
    assert costs(storage_bytes_per_s=2e9).write_s == 12.0


def test_the_report_calls_an_estimate_an_estimate_and_asks_for_a_price():
    text = format_plan(PLAN, costs())
    assert "an estimate, with all communication hidden" in text
    assert "money: give --price-per-chip-hour" in text
    for figure in (
        "made-up on v5e-16 (v5e:4x4), 16 chips", "12.00 GiB", "4.00 GiB", "1.117 of the model's",
        "splash 96", "not overlapped", "2.25 s", "50.0%", "16.0 chip-hours",
    ):  # fmt: skip
        assert figure in text
    assert "24 at 1.5 a chip-hour" in format_plan(PLAN, costs(price_per_chip_hour=1.5))


def test_the_error_seen_is_that_of_the_published_table():
    ratios = [row.estimate_s / row.measured_s for row in PUBLISHED]
    assert len(ratios) == 5
    assert f"{min(ratios):.2f} to {max(ratios):.2f}" == "0.88 to 1.05"
    assert "0.88 to 1.05" in error_seen()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(421.6e12, "FLOP", "421.6 TFLOP"), (0, "B", "0 B"), (15e9, "B", "15 GB"), (999, "B", "999 B")],
)
def test_large_figures_get_a_prefix(value, unit, text):
    assert scaled(value, unit) == text


def test_a_difference_shows_where_it_is():
    after = dataclasses.replace(
        PLAN,
        peak_bytes=13 * GIB,
        collectives=PLAN.collectives[:2],
        settings={**PLAN.settings, "remat": "block"},
    )
    text = format_diff(PLAN, after)
    assert "remat: full -> block" in text
    assert "+8.3%" in text
    assert "all-reduce over fsdp" in text
    assert "HBM traffic" not in text
    assert "the same in every figure" in format_diff(PLAN, PLAN)
    by_name = diff_to_json(PLAN, after)
    assert by_name["peak"] == {"before": 12 * GIB, "after": 13 * GIB, "unit": "GiB"}
    assert by_name["all-gather over fsdp, not overlapped"]["before"] == 1_000_000_000
    assert {change.name for change in changes(PLAN, after) if change.before != change.after} == {
        "peak", "everything else", "all-reduce over fsdp",
        "all-reduce over fsdp, not overlapped",
    }  # fmt: skip


def test_a_picture_is_drawn_in_the_format_of_its_suffix(tmp_path):
    draw_plan(PLAN, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[1:4] == b"PNG"
    draw_plan(PLAN, tmp_path / "plan.svg")
    assert "temporaries: 3.00" in (tmp_path / "plan.svg").read_text()
    with pytest.raises(ConfigError, match=r"--picture: unknown format 'pgn'.*'png'"):
        draw_plan(PLAN, tmp_path / "plan.pgn")


def test_kernels_that_are_not_counted_are_told():
    plan = dataclasses.replace(PLAN, uncounted_kernels={"ring": 3})
    assert "of unknown FLOPs  ring 3: not in the figures above" in format_plan(plan, costs())
    assert "unknown" not in format_plan(PLAN, costs())
    older = {k: v for k, v in to_json(PLAN).items() if k != "uncounted_kernels"}
    assert from_json(older) == PLAN
