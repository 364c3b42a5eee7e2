"""DPO and its relatives on a small model: by hand from its logits, and what must not matter."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from response_batches import (
    EDITED,
    EXECUTION,
    MISMATCHED,
    REJECTED,
    Response,
    Row,
    Table,
    assert_same_gradients,
    lay_rows,
    run,
    run_table,
)

from llama_jax.config.loading import ConfigError
from llama_jax.config.post_training import DPOConfig
from llama_jax.config.run import MeshConfig
from llama_jax.objectives.preference import Preference
from llama_jax.objectives.responses import response_logps

RTOL = 1e-5
PROMPTS = ((5, 6, 7), (8, 9), (10, 11, 12, 13))
RECORDS = (
    (Response(PROMPTS[0], (20, 21, 2)), Response(PROMPTS[0], (22, 2), REJECTED)),
    (Response(PROMPTS[1], (23, 2)), Response(PROMPTS[1], (24, 25, 26, 2), REJECTED)),
    (Response(PROMPTS[2], (27, 28, 2)), Response(PROMPTS[2], (29, 30, 2), REJECTED)),
)
PAIR = ((1, 2, 3),)
APART = tuple(Row(record, PAIR) for record in RECORDS)
KTO_ROWS = tuple(
    Row((*record, Response(PROMPTS[i], RECORDS[i - 1][0].tokens, MISMATCHED)), PAIR)
    for i, record in enumerate(RECORDS)
)
LIVE = {
    "sigmoid": DPOConfig(reference="live"),
    "smoothed": DPOConfig(reference="live", label_smoothing=0.2),
    "ipo": DPOConfig(loss="ipo", reference="live"),
    "hinge": DPOConfig(loss="hinge", reference="live", beta=0.5),
    "length_normalised": DPOConfig(loss="length_normalised", reference="live", beta=2.0),
    "simpo": DPOConfig(loss="simpo", beta=2.0, gamma=0.7),
}
KTO = DPOConfig(loss="kto", reference="live", desirable_weight=1.5, undesirable_weight=0.5)


def objective(config):
    return Preference(config, EXECUTION.loss_chunk_size)


@functools.cache
def logps_by_hand(seed):
    """Of each record's responses, from a `Table`'s own numbers: those of their tokens."""
    table = Table(seed)
    rows, head = (np.asarray(array[...], np.float64) for array in (table.rows, table.head))

    def of(response):
        ids = np.array([*response.prompt, *response.tokens])
        logits = (rows[ids] * (1 + 0.1 * np.arange(ids.size)[:, None])) @ head
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        first = len(response.prompt) - 1
        return logps[np.arange(first, ids.size - 1), ids[first + 1 :]]

    return [[of(response) for response in row.responses] for row in KTO_ROWS]


def ratios_by_hand(cut=None, seeds=(0, 1)):
    """Summed log-ratios [records, responses] of two seeds, of all tokens but the last ones."""
    pairs = zip(*map(logps_by_hand, seeds), strict=True)
    return np.array(
        [[p[:cut].sum() - r[:cut].sum() for p, r in zip(*pair, strict=True)] for pair in pairs]
    )


def sigmoid_by_hand(h, smoothing=0.0):
    return (1 - smoothing) * np.log1p(np.exp(-h)) + smoothing * np.log1p(np.exp(h))


def by_hand(name, config):
    """The summed loss of the three pairs, the mean NLL of the chosen added."""
    total, beta = 0.0, config.beta
    for policy, reference in zip(logps_by_hand(0), logps_by_hand(1), strict=True):
        reduce = np.mean if name in ("ipo", "length_normalised", "simpo") else np.sum
        refer = 0.0 if name == "simpo" else 1.0
        values = [reduce(p) - refer * reduce(r) for p, r in zip(policy, reference, strict=True)]
        h = values[0] - values[1]
        total += {
            "ipo": (h - 1 / (2 * beta)) ** 2,
            "hinge": max(0.0, 1 - beta * h),
            "simpo": sigmoid_by_hand(beta * h - (config.gamma or 0.0)),
        }.get(name, sigmoid_by_hand(beta * h, config.label_smoothing))
        total -= config.nll_weight * policy[0].mean()
    return total


def with_reference(batch):
    """A reference stored beside the batch: a `Table`, which sees no other tokens."""
    stored_BR = response_logps(Table(1), jax.tree.map(jnp.asarray, batch), 64)
    return {**batch, "reference_logps": np.asarray(stored_BR)}


@pytest.mark.parametrize("name", LIVE)
def test_the_loss_is_what_numpy_makes_of_the_models_numbers(name):
    loss, sums = run_table(objective(LIVE[name]), lay_rows(APART, 24))
    assert loss == pytest.approx(by_hand(name, LIVE[name]), rel=RTOL)
    assert sums["pairs"] == 3
    assert sums["tokens"] == 17


def test_rewards_and_figures_are_beta_times_what_the_policy_prefers():
    loss, sums = run_table(objective(LIVE["sigmoid"]), lay_rows(APART, 24))
    chosen, rejected = 0.1 * ratios_by_hand()[:, :2].T
    assert sums["chosen_reward"] == pytest.approx(chosen.sum(), rel=RTOL)
    assert sums["rejected_reward"] == pytest.approx(rejected.sum(), rel=RTOL)
    assert sums["margin"] == pytest.approx((chosen - rejected).sum(), rel=RTOL)
    assert sums["accuracy"] == (chosen > rejected).sum()
    nll = -sum(policy[0].mean() for policy in logps_by_hand(0))
    assert sums["nll"] == pytest.approx(nll, rel=RTOL)
    figures = objective(LIVE["sigmoid"]).figures({**sums, "loss": loss})
    assert figures["loss"] == pytest.approx(loss / 3)
    assert figures["accuracy"] == pytest.approx(sums["accuracy"] / 3)
    assert set(figures) == {
        *("loss", "nll", "accuracy", "margin", "chosen_reward", "rejected_reward")
    }


@pytest.mark.parametrize("loss", ["sigmoid", "length_normalised", "kto"])
def test_against_itself_a_model_starts_at_log_2_or_a_half(loss):
    config = DPOConfig(loss=loss, reference="live", nll_weight=0.0)
    value, sums = run_table(objective(config), lay_rows(KTO_ROWS, 32), frozen_seed=0)
    expected = 6 * 0.5 if loss == "kto" else 3 * math.log(2.0)
    assert value == pytest.approx(expected, rel=1e-6)
    names = ("margin", "accuracy", "chosen_reward")
    if loss == "kto":
        names = ("pairs_margin", "pairs_accuracy", "desirable_reward", "undesirable_reward")
    assert {sums[name] for name in names} == {0.0}


def test_swapping_all_pairs_changes_the_loss_by_the_margins():
    config = dataclasses.replace(LIVE["sigmoid"], nll_weight=0.0)
    swapped = tuple(Row(row.responses, ((2, 1, 3),)) for row in APART)
    loss, sums = run_table(objective(config), lay_rows(APART, 24))
    other, other_sums = run_table(objective(config), lay_rows(swapped, 24))
    assert loss - other == pytest.approx(-sums["margin"], rel=1e-4)
    assert other_sums["margin"] == pytest.approx(-sums["margin"], rel=1e-6)
    assert other_sums["accuracy"] == 3 - sums["accuracy"]


def test_the_gradient_is_the_plain_forms():
    """Through log-softmax and plain indexing; a swapped pair's is the opposite at the start."""
    config = dataclasses.replace(LIVE["sigmoid"], beta=0.4)
    batch = jax.tree.map(jnp.asarray, lay_rows(APART, 24))
    graphdef, params = nnx.split(Table(0))

    def plain(params):
        table, total = nnx.merge(graphdef, params), 0.0
        for b, row in enumerate(APART):
            h = 0.0
            for sign, model in ((1, table), (-1, Table(1))):
                x = model.hidden(batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=0)
                logps = jax.nn.log_softmax(x[b] @ model.head[...])
                logps = logps[jnp.arange(24), batch["targets"][b]]
                sums = [(logps * (batch["response_ids"][b] == r)).sum() for r in (1, 2)]
                h += sign * (sums[0] - sums[1])
                if model is table:
                    total -= 0.2 * sums[0] / len(row.responses[0].tokens)
            total += jnp.log1p(jnp.exp(-0.4 * h))
        return total

    def ours(params):
        return objective(config)(nnx.merge(graphdef, params), batch, None, {"reference": Table(1)})[
            0
        ]

    found, expected = (jax.tree.leaves(jax.jit(jax.grad(f))(params)) for f in (ours, plain))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def in_one_row():
    """The same pairs, responses of all records shuffled into one row and one that is alone."""
    (a, b), (c, d), (e, f) = RECORDS
    return (Row((d, a, c, b), ((3, 1, 3), (2, 4, 3))), Row((f, e), ((2, 1, 3),)))


def test_packing_padding_and_order_do_not_matter():
    """Of a Llama, which sees the other tokens of a segment."""
    apart = with_reference(lay_rows(APART, 16))
    together = with_reference(lay_rows(in_one_row()[::-1], 48, gap=2))
    (loss, sums, grads), (other, other_sums, other_grads) = (
        run(objective(DPOConfig()), batch) for batch in (apart, together)
    )
    assert other == pytest.approx(loss, rel=RTOL)
    assert other_sums == pytest.approx(sums, rel=1e-4)
    assert_same_gradients(other_grads, grads)


def test_kto_by_hand_with_the_divergence_of_mismatched_responses():
    loss, sums = run_table(objective(KTO), lay_rows(KTO_ROWS, 32), seed=1, frozen_seed=0)
    ratios = ratios_by_hand(seeds=(1, 0))
    z = ratios[:, 2].mean()
    chosen = 1.5 / (1 + np.exp(0.1 * (ratios[:, 0] - z)))
    rejected = 0.5 / (1 + np.exp(0.1 * (z - ratios[:, 1])))
    nll = -sum(policy[0].mean() for policy in logps_by_hand(1))
    assert z > 0
    assert sums["responses"] == 6
    assert sums["divergence"] == pytest.approx(6 * z, rel=RTOL)
    assert loss == pytest.approx(chosen.sum() + rejected.sum() + 0.2 * nll, rel=RTOL)
    figures = objective(KTO).figures({**sums, "loss": loss})
    assert figures["divergence"] == pytest.approx(z, rel=RTOL)
    assert figures["margin"] == pytest.approx(0.1 * (ratios[:, 0] - ratios[:, 1]).mean(), rel=RTOL)


def singles():
    """The responses of `KTO_ROWS` without pairs, two rows a record: the first with a mismatched."""
    apart = [(Row((a, other)), Row((b,))) for a, b, other in (row.responses for row in KTO_ROWS)]
    return tuple(row for rows in apart for row in rows)


def test_single_responses_have_the_loss_of_the_same_ones_in_pairs():
    """Of a Llama, gradients too; figures of pairs are told only where there are pairs."""
    paired = run(objective(KTO), lay_rows(KTO_ROWS, 32))
    loss, sums, grads = run(objective(KTO), lay_rows(singles(), 24))
    assert loss == pytest.approx(paired[0], rel=RTOL)
    assert_same_gradients(grads, paired[2])
    assert (sums["responses"], sums["pairs"]) == (6, 0)
    same = {n for n in sums if not n.startswith("pairs")}
    assert {n: sums[n] for n in same} == pytest.approx({n: paired[1][n] for n in same}, rel=1e-4)
    told = objective(KTO).figures({**sums, "loss": loss})
    both = objective(KTO).figures({**paired[1], "loss": paired[0]})
    assert set(told) == {"loss", "nll", "divergence", "chosen_reward", "rejected_reward"}
    assert set(both) - set(told) == {"margin", "accuracy"}
    assert told == pytest.approx({name: both[name] for name in told}, rel=1e-4)


def test_single_responses_by_hand():
    """Two desirable and one undesirable: rewards are means of each kind."""
    (a, _, x), (_, d, y), (e, _, _) = (row.responses for row in KTO_ROWS)
    rows = [Row((a, x)), Row((d, y)), Row((e,))]
    loss, sums = run_table(objective(KTO), lay_rows(rows, 24), seed=1, frozen_seed=0)
    ratios = ratios_by_hand(seeds=(1, 0))
    z = max(ratios[:2, 2].mean(), 0.0)
    wanted = sum(1.5 / (1 + np.exp(0.1 * (ratios[i, 0] - z))) for i in (0, 2))
    wanted += 0.5 / (1 + np.exp(0.1 * (z - ratios[1, 1])))
    wanted -= 0.2 * sum(logps_by_hand(1)[i][0].mean() for i in (0, 2))
    assert loss == pytest.approx(wanted, rel=RTOL)
    figures = objective(KTO).figures({**sums, "loss": loss})
    assert figures["loss"] == pytest.approx(wanted / 3, rel=RTOL)
    assert figures["chosen_reward"] == pytest.approx(0.1 * ratios[[0, 2], 0].mean(), rel=RTOL)
    assert figures["rejected_reward"] == pytest.approx(0.1 * ratios[1, 1], rel=RTOL)


def test_an_edited_record_is_three_pairs_of_three_responses():
    a, b = RECORDS[0]
    edited = Response(PROMPTS[0], (31, 32, 33, 2), EDITED)
    record = Row((b, edited, a), ((2, 3, 2), (3, 1, 1), (2, 1, 3)))
    loss, sums = run_table(objective(LIVE["sigmoid"]), lay_rows([record], 24))
    pairs = [Row((x, y), PAIR) for x, y in ((edited, a), (a, b), (edited, b))]
    alone = [run_table(objective(LIVE["sigmoid"]), lay_rows([pair], 24)) for pair in pairs]
    assert sums["pairs"] == 3
    assert loss == pytest.approx(sum(one[0] for one in alone), rel=RTOL)


def test_formatting_is_left_out_of_the_margin_but_not_of_the_nll():
    loss, sums = run_table(objective(LIVE["sigmoid"]), lay_rows(APART, 24, mask_end=True))
    ratios = ratios_by_hand(cut=-1)
    nll = -sum(policy[0].mean() for policy in logps_by_hand(0))
    expected = sigmoid_by_hand(0.1 * (ratios[:, 0] - ratios[:, 1])).sum() + 0.2 * nll
    assert loss == pytest.approx(expected, rel=RTOL)
    assert sums["tokens"] == 17 - 6
    assert sums["nll"] == pytest.approx(nll, rel=RTOL)


def test_stored_reference_log_probabilities_are_the_live_models():
    batch = jax.tree.map(jnp.asarray, lay_rows(in_one_row(), 40))
    stored = response_logps(Table(1), batch, 7)
    assert stored.shape == (2, 4)
    loss, sums = run_table(objective(DPOConfig()), {**batch, "reference_logps": stored})
    assert objective(DPOConfig()).frozen == ()
    expected, expected_sums = run_table(objective(LIVE["sigmoid"]), batch)
    assert loss == pytest.approx(expected, rel=RTOL)
    assert sums == pytest.approx(expected_sums, rel=1e-4)


def test_a_batch_without_stored_log_probabilities_is_refused():
    with pytest.raises(ConfigError, match=r"^objective\.reference: 'cached', but the batch has no"):
        run_table(objective(DPOConfig()), lay_rows(APART, 24))


def test_a_batch_without_pairs_is_zero_not_nan():
    loss, sums = run_table(objective(LIVE["ipo"]), lay_rows([Row(()), Row(())], 24))
    assert loss == 0.0
    assert set(sums.values()) == {0.0}


@functools.cache
def unsharded(name):
    return run(objective(KTO if name == "kto" else LIVE[name]), lay_rows((*KTO_ROWS, Row(())), 32))


# A context axis splits the length, so that rows are in zigzag order.
@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        (MeshConfig(fsdp=2, context=2, tensor=2), "kto"),
        pytest.param(MeshConfig(data=2, fsdp=2, context=2), "sigmoid", marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), "sigmoid", marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=1, context=4, tensor=2), "kto", marks=pytest.mark.slow),
    ],
)
def test_sharded_is_unsharded(mesh, name):
    loss, sums, grads = unsharded(name)
    config, batch = KTO if name == "kto" else LIVE[name], lay_rows((*KTO_ROWS, Row(())), 32)
    other, other_sums, other_grads = run(objective(config), batch, mesh_config=mesh)
    assert other == pytest.approx(loss, rel=RTOL)
    assert other_sums == pytest.approx(sums, rel=1e-4, abs=1e-6)
    assert_same_gradients(other_grads, grads)
