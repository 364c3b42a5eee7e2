"""Advice on a run that doesn't fit: what takes the room, and changes that were seen to fit."""

import pytest
from made_up_plans import GIB, FormulaPlanner

from llama_jax.config.files import load_run_config
from llama_jax.config.hardware import find_slice
from llama_jax.planning.advice import (
    MOST_COMPILED,
    advice_to_json,
    advise,
    format_advice,
)
from llama_jax.planning.compiling import OutOfMemoryError
from llama_jax.planning.variants import REMAT_PRESETS, changed, describe

CONFIG = load_run_config(
    "pretrain/llama3.1-8b-v5e-16", ["execution.remat=none", "training.microbatches=2"]
)


def advice_for(planner, config=CONFIG):
    with pytest.raises(OutOfMemoryError) as caught:
        planner.plan(config, "big")
    planner.planned.clear()
    return advise(planner, config, "big", caught.value, lambda message: None)


def test_each_change_advised_fits_and_is_another_kind():
    planner = FormulaPlanner(slice_=find_slice("v6e-16"))
    advice = advice_for(planner)
    assert 2 <= len(advice.remedies) <= 3
    assert len(planner.planned) <= MOST_COMPILED
    for remedy in advice.remedies:
        assert remedy.plan.peak_bytes <= remedy.plan.hbm_bytes
    kinds = {(tuple(remedy.changes), remedy.slice_name) for remedy in advice.remedies}
    assert len(kinds) == len(advice.remedies)


def test_the_mildest_of_a_kind_is_advised():
    planner = FormulaPlanner(slice_=find_slice("v6e-16"))
    by_kind = {tuple(one.changes): one.changes for one in advice_for(planner).remedies}
    preset = by_kind[("execution.remat",)]["execution.remat"]
    milder = REMAT_PRESETS[REMAT_PRESETS.index(preset) - 1]
    with pytest.raises(OutOfMemoryError):
        planner.plan(changed(CONFIG, {"execution.remat": milder}), "milder")


def test_the_report_says_by_how_much_and_what_to_do():
    advice = advice_for(FormulaPlanner(slice_=find_slice("v6e-16")))
    text = format_advice(advice)
    over = (advice.needed_bytes - advice.available_bytes) / GIB
    assert f"{over:.2f} GiB too much" in text
    assert "saved activations  20.00 GiB" in text
    assert "f32[1024,128256]" in text
    assert describe(advice.remedies[0].changes) in text
    table = advice_to_json(advice)
    assert table["fits"] is False
    assert table["remedies"][0]["plan"]["fits"] is True


def test_more_chips_are_advised_where_nothing_else_helps():
    config = load_run_config("pretrain/llama3.1-70b-v6e-256", ["mesh={fsdp=-1}"])
    advice = advice_for(FormulaPlanner(slice_=find_slice("v6e-8")), config)
    assert [one.slice_name for one in advice.remedies] in ([], ["v6e-64"])
    assert "more chips" in format_advice(advice) or "--topology v6e-64" in format_advice(advice)
