"""The search: what is tried, what is dropped, what is compiled, and what comes out of it."""

import pytest
from made_up_plans import FormulaPlanner

from llama_jax.config.files import load_run_config
from llama_jax.config.hardware import find_slice
from llama_jax.planning.compiling import PlanError
from llama_jax.planning.search import (
    candidates,
    format_ranking,
    meshes,
    ranking_to_json,
    search,
    write_chosen,
)

CONFIG = load_run_config("pretrain/llama3.1-8b-v5e-16")


def quiet(message):
    del message


def test_meshes_divide_devices_batch_and_model_and_only_data_crosses_slices():
    found = list(meshes(CONFIG, 32, 2))
    assert {tuple(mesh.values()) for mesh in found} >= {(2, 16, 1, 1), (4, 8, 1, 1), (2, 2, 4, 2)}
    for mesh in found:
        data, fsdp, context, tensor = mesh.values()
        assert data * fsdp * context * tensor == 32
        assert data % 2 == 0
        assert CONFIG.data.batch_size % (data * fsdp) == 0
        assert tensor <= CONFIG.model.num_kv_heads


def test_candidates_keep_the_batch_and_price_every_preset():
    found = list(candidates(CONFIG, FormulaPlanner()))
    assert {one.config.data.batch_size for one in found} == {CONFIG.data.batch_size}
    assert {one.config.execution.remat for one in found} == {
        "none", "dots", "block", "attention", "full",
    }  # fmt: skip
    assert len({str(one.changes) for one in found}) == len(found)


def test_the_search_ranks_what_fits_by_time_and_writes_a_run_that_loads(tmp_path):
    planner = FormulaPlanner()
    ranking = search(planner, CONFIG, 3, quiet)
    fits = [one for one in ranking.compiled if one.plan is not None]
    assert len(fits) == 3
    assert 0 < ranking.fitting < ranking.tried
    assert len(planner.planned) == len(ranking.compiled) <= 6
    times = [one.plan.pessimistic_s for one in fits]
    assert times == sorted(times)
    # No candidate that fits by the model it was priced with is faster than the best.
    limit = planner.slice_.chip.device_usable_hbm_bytes
    fitting = [one for one in candidates(CONFIG, planner) if one.peak_bytes <= limit]
    assert times[0] == pytest.approx(min(one.estimate_s for one in fitting))
    write_chosen(ranking, tmp_path / "chosen.toml", planner)
    chosen = load_run_config(str(tmp_path / "chosen.toml"))
    assert chosen.execution == ranking.best.candidate.config.execution
    assert (chosen.hardware.slice, chosen.data) == ("v5e-16", CONFIG.data)
    text = format_ranking(ranking)
    assert "best: --set mesh.data=1" in text
    assert ranking_to_json(ranking)["ranking"][0]["plan"]["fits"]


def test_what_the_compiler_refuses_is_told_and_ranked_last():
    class Refusing(FormulaPlanner):
        def plan(self, config, name):
            if config.mesh.tensor > 1:
                raise PlanError("the compiler refuses: no")
            return super().plan(config, name)

    ranking = search(Refusing(), CONFIG, 8, quiet)
    refused = [one for one in ranking.compiled if one.plan is None]
    assert refused
    assert ranking.compiled[-len(refused) :] == tuple(refused)
    assert ranking_to_json(ranking)["ranking"][-1]["refusal"] == "the compiler refuses: no"


def test_nothing_fits_is_an_outcome():
    ranking = search(FormulaPlanner(slice_=find_slice("v5e-1")), CONFIG, 2, quiet)
    assert ranking.best is None
    assert "none of them fits" in format_ranking(ranking)
