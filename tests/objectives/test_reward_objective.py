"""The reward objective by hand, its accuracies and calibration, and what must not matter."""

import functools

import numpy as np
import pytest
from response_batches import (
    REJECTED,
    SCALAR,
    Response,
    Row,
    Table,
    assert_same_gradients,
    lay_rows,
    run,
    run_table,
)

from llama_jax.config.post_training import RewardConfig
from llama_jax.config.run import MeshConfig
from llama_jax.objectives.calibration import bin_sums, calibration_error
from llama_jax.objectives.reward import Reward

RTOL = 1e-5
PROMPTS = ((5, 6, 7), (8, 9), (10, 11, 12, 13), (14, 15))
RECORDS = tuple(
    (Response(prompt, (20 + n, 2)), Response(prompt, (24 + n, 28 + n, 3 + n % 2), REJECTED))
    for n, prompt in enumerate(PROMPTS)
)
STRENGTHS = (3, 2, 1, 3)
APART = tuple(Row(r, ((1, 2, s),)) for r, s in zip(RECORDS, STRENGTHS, strict=True))


def lay(rows, length, **options):
    return lay_rows(rows, length, last_only=True, **options)


@functools.cache
def leads_by_hand():
    """What a `Table`'s rewards put the chosen response ahead by, and the mean of each pair."""
    table = Table(0)
    rows, head = (np.asarray(array[...], np.float64) for array in (table.rows, table.reward_head))

    def reward(response):
        ids = (*response.prompt, *response.tokens)
        return rows[ids[-1]] @ head * (1 + 0.1 * (len(ids) - 1))

    rewards = np.array([[reward(response) for response in record] for record in RECORDS])
    return rewards[:, 0] - rewards[:, 1], rewards.mean(axis=1)


@pytest.mark.parametrize("kind", ["none", "small", "large"])
def test_the_loss_is_bradley_terry_at_each_responses_last_token(kind):
    lead, _ = leads_by_hand()
    margins = {"none": [0, 0, 0, 0], "small": [1, 2 / 3, 1 / 3, 1], "large": [3, 2, 1, 3]}[kind]
    loss, sums = run_table(Reward(RewardConfig(margins=kind)), lay(APART, 24))
    assert loss == pytest.approx(np.log1p(np.exp(np.array(margins) - lead)).sum(), rel=RTOL)
    assert sums["margin"] == pytest.approx(lead.sum(), rel=RTOL)
    assert sums["accuracy"] == (lead > 0).sum()
    assert sums["pairs"] == 4
    assert sums["tokens"] == sum(2 * len(prompt) + 5 for prompt in PROMPTS)


def test_the_penalty_is_the_squared_mean_of_each_pair():
    _, mean = leads_by_hand()
    plain, _ = run_table(Reward(RewardConfig()), lay(APART, 24))
    loss, sums = run_table(Reward(RewardConfig(mean_reward_penalty=0.01)), lay(APART, 24))
    assert sums["penalty"] == pytest.approx((mean**2).sum(), rel=RTOL)
    assert loss - plain == pytest.approx(0.01 * (mean**2).sum(), rel=1e-3)


def test_figures_tell_accuracy_by_strength_and_the_calibration_error():
    lead, _ = leads_by_hand()
    objective = Reward(RewardConfig(calibration_bins=1))
    loss, sums = run_table(objective, lay(APART, 24))
    figures = objective.figures({**sums, "loss": loss})
    right = lead > 0
    assert figures["accuracy"] == right.mean()
    assert figures["accuracy_significantly"] == right[[0, 3]].mean()
    assert figures["accuracy_better"] == right[1]
    assert figures["accuracy_slightly"] == right[2]
    assert "accuracy_marginally" not in figures  # no such pair
    said = 1 / (1 + np.exp(-np.abs(lead)))
    assert figures["calibration_error"] == pytest.approx(abs(said.mean() - right.mean()), rel=1e-4)


def test_calibration_by_hand_in_ten_bins():
    # 80 % sure four times, of which three are right; 99.9 % sure once and wrong; a tie.
    sure = np.log(4.0)
    lead = np.array([sure, sure, sure, -sure, -np.log(999.0), 0.0, 50.0], np.float32)
    is_pair = np.array([1, 1, 1, 1, 1, 1, 0], bool)
    sums = {name: float(value) for name, value in bin_sums(lead, is_pair, 10).items()}
    error = (4 * abs(0.8 - 0.75) + 0.999 + 0.0) / 6
    assert calibration_error(sums, 10) == pytest.approx(error, rel=1e-5)
    added = {name: 3 * value for name, value in sums.items()}
    assert calibration_error(added, 10) == pytest.approx(error, rel=1e-5)


def test_swapping_all_pairs_changes_the_loss_by_the_leads():
    swapped = tuple(Row(row.responses, ((2, 1, row.pairs[0][2]),)) for row in APART)
    loss, sums = run_table(Reward(RewardConfig()), lay(APART, 24))
    other, other_sums = run_table(Reward(RewardConfig()), lay(swapped, 24))
    assert other - loss == pytest.approx(sums["margin"], rel=1e-4)
    assert other_sums["accuracy"] == 4 - sums["accuracy"]


def shuffled():
    (a, b), (c, d), (e, f), (g, h) = RECORDS
    return (
        Row((d, a, b, c), ((4, 1, 2), (2, 3, 3))),
        Row((f, e), ((2, 1, 1),)),
        Row((h, g), ((2, 1, 3),)),
    )


@functools.cache
def apart():
    """Of a Llama, which sees the other tokens of a segment."""
    return run(Reward(RewardConfig(margins="small")), lay(APART, 24), config=SCALAR)


def test_packing_padding_and_order_do_not_matter():
    loss, sums, grads = apart()
    objective, batch = Reward(RewardConfig(margins="small")), lay(shuffled(), 48, gap=2)
    other, other_sums, other_grads = run(objective, batch, config=SCALAR)
    assert other == pytest.approx(loss, rel=RTOL)
    assert other_sums == pytest.approx(sums, rel=1e-4, abs=1e-5)
    assert_same_gradients(other_grads, grads)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=2, context=2, tensor=2),
        pytest.param(MeshConfig(data=2, fsdp=2, context=2), marks=pytest.mark.slow),
    ],
)
def test_sharded_is_unsharded(mesh):
    loss, sums, grads = apart()
    objective = Reward(RewardConfig(margins="small"))
    other, other_sums, other_grads = run(objective, lay(APART, 24), config=SCALAR, mesh_config=mesh)
    assert other == pytest.approx(loss, rel=RTOL)
    assert other_sums == pytest.approx(sums, rel=1e-4, abs=1e-5)
    assert_same_gradients(other_grads, grads)
