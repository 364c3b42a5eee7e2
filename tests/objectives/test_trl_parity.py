"""Losses and metrics of TRL on the same models and batches: stored ones always, live ones with it.

Ours are of packed rows, theirs of padded ones.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl_figures
from flax import nnx
from response_batches import EXECUTION, MODEL, SCALAR, Row, lay_rows, mesh_of, model_on
from trl_figures import DISTILL_CASES, DPO_CASES, KTO_ROWS, POLICY, REFERENCE, REWARD_CASES
from weights_by_seed import weights

from llama_jax.objectives.objective import make_objective
from llama_jax.objectives.responses import hidden

TOLERANCE = 1e-5  # relative, and absolute below 1
CASES = {**DPO_CASES, **REWARD_CASES, **DISTILL_CASES}


class Recorded:
    """A model that was run once: what its head read, and its heads."""

    def __init__(self, x_BTD, values):
        self.x_BTD, self.values = x_BTD, values

    def hidden(self, tokens_BT, *, positions_BT, segment_ids_BT):
        return jnp.asarray(self.x_BTD)

    def for_loss(self, x_BTD):
        return x_BTD, self.values["lm_head"]

    def rewards(self, x_BTD):
        return x_BTD @ self.values["reward_head"]


@functools.cache
def runner(config):
    """Parameters to be overwritten, and the compiled `hidden`, of a model."""
    model = model_on(mesh_of(), config)
    graphdef, state = nnx.split(model)
    return state, jax.jit(lambda state, batch: hidden(nnx.merge(graphdef, state), batch))


@functools.cache
def recorded(config, seed, kind):
    state, run = runner(config)
    values = weights(config, seed)
    for path, param in nnx.to_flat_state(state):
        param[...] = jnp.asarray(values[".".join(map(str, path))])
    with jax.set_mesh(mesh_of()):
        x_BTD = run(state, packed(kind))
    return Recorded(np.asarray(x_BTD), values)


def packed(kind):
    """The records in rows of several, of one shape: each with a mismatched response, or by two."""
    if kind == "preference":
        return lay_rows(KTO_ROWS, 32, gap=1)
    if kind == "single responses":
        apart = [(Row((a,)), Row((x, b))) for a, b, x in (r.responses for r in KTO_ROWS)]
        return lay_rows([row for rows in apart for row in rows], 32, gap=1)
    first, second, third, fourth = trl_figures.ROWS
    rows = [joined(first, fourth), Row(()), joined(second, third), Row(())]
    return lay_rows(rows, 32, last_only=kind == "reward")


def joined(one, other):
    (pair,), ((chosen, rejected, strength),) = one.pairs, other.pairs
    return Row((*one.responses, *other.responses), (pair, (chosen + 2, rejected + 2, strength)))


def figures(name, kind=None):
    """Held-out figures of one batch."""
    objective, config = make_objective(CASES[name], EXECUTION), MODEL
    kind = kind or ("preference" if name in DPO_CASES else "distillation")
    if name in REWARD_CASES:
        kind, config = "reward", SCALAR
    model = recorded(config, POLICY, kind)
    frozen = {other: recorded(config, REFERENCE, kind) for other in objective.frozen}
    batch = jax.tree.map(jnp.asarray, packed(kind))
    loss, sums = jax.jit(lambda batch: objective(model, batch, None, frozen))(batch)
    return objective.figures({n: float(x) for n, x in {**sums, "loss": loss}.items()})


def assert_all_near(ours, theirs):
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_metrics_are_the_stored_ones_of_trl(name):
    theirs = trl_figures.stored()[name]
    assert len(theirs) >= 2
    assert_all_near(figures(name), theirs)


def test_single_responses_have_the_stored_figures_of_trls_kto():
    theirs = {n: x for n, x in trl_figures.stored()["kto"].items() if n != "margin"}
    assert theirs.keys() == {"loss", "chosen_reward", "rejected_reward", "divergence"}
    ours = figures("kto", "single responses")
    assert "margin" not in ours
    assert_all_near(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TRL's own
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_losses_and_metrics_are_those_of_the_installed_trl():
    live, stored = trl_figures.trl_figures(), trl_figures.stored()
    for name, theirs in live.items():
        assert_all_near(stored[name], theirs)
        assert_all_near(figures(name), theirs)
