"""Stored plans: what counts as moved, the page, and every shipped run against its stored plan."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_plans import GIB, PLAN

from llama_jax.config.files import load_run_config
from llama_jax.config.hardware import find_slice
from llama_jax.planning import cache
from llama_jax.planning.analytic import memory_model, sizes_of
from llama_jax.planning.compiling import prepare_compiler
from llama_jax.planning.making import Planner
from llama_jax.planning.plan import CollectiveUse, read_plan
from llama_jax.planning.stored import moved, plans_page, read_plans, shipped_runs, write_plan

FOLDER = Path(__file__).parent / "plans"
STORED = read_plans(FOLDER)
PAGE = Path(__file__).parents[2] / "docs" / "plans.md"
# What compiles in less is compared in the default suite too.
QUICK_S = 15
# Of the rest, these always; the others where their traced program has changed.
ALWAYS_COMPILED = ("bench/llama3.1-8b-v5e-16-full", "pretrain/llama3.2-1b-v5e-8")


def quick(name):
    return name in STORED and STORED[name].compile_s < QUICK_S


def test_a_plan_is_stored_and_read_back(tmp_path):
    write_plan(PLAN, tmp_path)
    assert read_plan(tmp_path / "made-up.json") == PLAN


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"peak_bytes": PLAN.peak_bytes + GIB // 20}, []),
        ({"compile_s": 1e6}, []),
        (
            {"peak_bytes": PLAN.peak_bytes + GIB},
            ["everything else: 1.07374e+09 -> 2.14748e+09 (+100.0%)",
             "peak: 1.28849e+10 -> 1.39586e+10 (+8.3%)"],
        ),
        ({"executed_flops": 230e12}, ["executed FLOPs: 2.2e+14 -> 2.3e+14 (+4.5%)"]),
        ({"hbm_traffic_bytes": 0.9e12}, ["HBM traffic: 1e+12 -> 9e+11 (-10.0%)"]),
        (
            {"collectives": (*PLAN.collectives, CollectiveUse("all-to-all", "fsdp", 1, 8, False))},
            ["all-to-all over fsdp: 0 -> 8 (+inf%)",
             "all-to-all over fsdp, not overlapped: 0 -> 8 (+inf%)"],
        ),
        ({"kernel_calls": {}}, ["kernel calls: {'splash': 96} -> {}"]),
    ],
)  # fmt: skip
def test_what_moved_is_named_with_both_figures(change, told):
    assert moved(PLAN, dataclasses.replace(PLAN, **change)) == told


def test_the_page_has_a_row_a_plan_by_size_of_model():
    larger = dataclasses.replace(PLAN, run="larger", model_flops=1e15)
    lines = plans_page([larger, PLAN]).splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows] == ["run", "---", "made-up", "larger"][: len(rows)]
    assert "12.00 of 16.00" in rows[2]
    assert len({len(row) for row in rows}) == 1


def test_every_shipped_run_has_a_stored_plan():
    assert set(STORED) == set(shipped_runs())


def test_what_is_stored_is_shipped_and_fits():
    assert set(STORED) <= set(shipped_runs())
    for plan in STORED.values():
        assert plan.peak_bytes <= plan.hbm_bytes


def test_the_page_is_what_the_command_writes_from_the_stored_plans():
    assert PAGE.read_text(encoding="utf-8") == plans_page(STORED.values())


def test_the_comparison_is_what_the_command_prints_from_the_stored_plans():
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks" / "compare_plans.py")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    page = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    for table in printed.stdout.strip().split("\n\n"):
        assert table in page


@pytest.mark.parametrize("name", STORED)
def test_the_analytic_peak_is_within_a_tenth_of_the_compiled_one(name):
    plan, config = STORED[name], load_run_config(name)
    num_devices = plan.num_chips * plan.devices_per_chip
    sizes = sizes_of(config, num_devices, plan.num_slices)
    peak = memory_model(config, sizes).peak_bytes * plan.devices_per_chip
    assert peak == pytest.approx(plan.peak_bytes, rel=0.1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if quick(name) else pytest.mark.slow) for name in shipped_runs()],
)
def test_a_shipped_run_compiles_to_what_its_stored_plan_says(name):
    pytest.importorskip("libtpu")
    stored, config = STORED[name], load_run_config(name)
    if cache.versions() != stored.versions:
        pytest.skip(f"stored with {stored.versions}, here are {cache.versions()}")
    prepare_compiler()
    planner = Planner(find_slice(config.hardware.slice), config.hardware.slices)
    # What the compiler would be given is still the same for most runs: it needn't be told again.
    if planner.program(config) == stored.program and name not in ALWAYS_COMPILED:
        return
    told = moved(stored, planner.plan(config, name))
    assert not told, "\n".join([f"{name} moved; if wanted, store it anew:", *told])
