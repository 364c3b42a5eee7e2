"""Each transform against plain NumPy on given logits, ties and edges typed out; draws counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.loading import ConfigError
from llama_jax.inference import sampler
from llama_jax.inference.sampler import NO_TOKEN, Strengths, Transforms, sample, transformed
from llama_jax.inference.sampling import Sampling

RANDOM_BV = np.random.default_rng(0).normal(size=(5, 97)).astype(np.float32) * 3


def kept(logits_BV):
    """Ids that are left, row by row."""
    return [np.flatnonzero(row > -np.inf).tolist() for row in np.asarray(logits_BV)]


def logs(*probs):
    return jnp.log(jnp.array([probs], jnp.float32))


def run(logits_BV, sampling, *, seed=0, seen=None, made=None):
    logits_BV = jnp.asarray(logits_BV, jnp.float32)
    rows = jnp.arange(len(logits_BV), dtype=jnp.int32)
    keys_B = sampler.row_keys(jnp.uint32(seed), rows, jnp.zeros_like(rows))
    return sample(
        logits_BV,
        keys_B,
        Transforms.of(sampling, logits_BV.shape[1]),
        Strengths.of(sampling),
        seen_BV=seen,
        made_BV=made,
    )


def test_repetition_divides_logits_above_zero_and_multiplies_those_below():
    seen = jnp.array([[True, True, False, False]])
    got = sampler.penalize_repetition(jnp.array([[3.0, -3.0, 3.0, -3.0]]), seen, 1.5)
    np.testing.assert_allclose(got, [[2.0, -4.5, 3.0, -3.0]])


def test_presence_is_taken_off_once_however_often_a_token_came():
    sampling = Sampling(1, temperature=0.0, presence_penalty=0.75)
    made = jnp.array([[True, False, False]])
    args = (Transforms.of(sampling, 3), Strengths.of(sampling))
    got = transformed(jnp.array([[1.0, 0.5, -1.0]]), *args, made_BV=made)
    np.testing.assert_allclose(got, [[0.25, 0.5, -1.0]])


@pytest.mark.parametrize("k", [1, 3, 96])
def test_top_k_keeps_the_k_largest(k):
    wanted = [sorted(np.argsort(-row)[:k].tolist()) for row in RANDOM_BV]
    assert kept(sampler.keep_top_k(jnp.asarray(RANDOM_BV), k)) == wanted


def test_top_k_keeps_all_that_equal_the_last_one():
    logits = jnp.array([[2.0, 1.0, 3.0, 2.0, 2.0, 0.0]])
    assert kept(sampler.keep_top_k(logits, 2)) == [[0, 2, 3, 4]]
    assert kept(sampler.keep_top_k(logits, 1)) == [[2]]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p(p):
    wanted = []
    for row in RANDOM_BV.astype(np.float64):
        probs = np.exp(row - row.max())
        probs /= probs.sum()
        order = np.argsort(-probs)
        count = np.searchsorted(np.cumsum(probs[order]), p) + 1
        wanted.append(sorted(order[:count].tolist()))
    assert kept(sampler.keep_top_p(jnp.asarray(RANDOM_BV), p)) == wanted


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        (0.25, [1]),  # the first one crosses it by itself
        (0.5, [1]),  # reached exactly: no further one
        (0.51, [0, 1, 3]),  # the one that crosses, and its equal
        (0.75, [0, 1, 3]),
        (0.95, [0, 1, 2, 3]),
        (1e-30, [1]),
    ],
)
def test_top_p_at_its_edges_and_with_ties(p, wanted):
    assert kept(sampler.keep_top_p(logs(0.1875, 0.5, 0.125, 0.1875), p)) == [wanted]


def test_min_p_is_a_share_of_the_likeliest_and_the_likeliest_always_stays():
    logits = jnp.array([[0.0, np.log(0.5), np.log(0.1), np.log(0.05)]], jnp.float32)
    assert kept(sampler.keep_min_p(logits + 7, 0.4)) == [[0, 1]]
    assert kept(sampler.keep_min_p(logits, 0.07)) == [[0, 1, 2]]
    assert kept(sampler.keep_min_p(logits, 1.0)) == [[0]]


def test_filters_work_on_what_temperature_and_the_filters_before_leave():
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    # Temperature 0.5 squares: 16 9 4 1 of 30. top-k leaves 16 9 4 of 29; 25 / 29 reach 0.8.
    sampling = Sampling(1, temperature=0.5, top_k=3, top_p=0.8)
    got = transformed(logs(*probs), Transforms.of(sampling, 4), Strengths.of(sampling))
    assert kept(got) == [[0, 1]]
    # Without top-k 25 / 30 would reach 0.86 only with the third.
    sampling = Sampling(1, temperature=0.5, top_p=0.85)
    got = transformed(logs(*probs), Transforms.of(sampling, 4), Strengths.of(sampling))
    assert kept(got) == [[0, 1, 2]]
    sampling = Sampling(1, temperature=0.5, top_k=3, top_p=0.85)
    got = transformed(logs(*probs), Transforms.of(sampling, 4), Strengths.of(sampling))
    assert kept(got) == [[0, 1]]
    # min-p after temperature: 4 / 16 is under 0.3, while 0.2 / 0.4 would not be.
    sampling = Sampling(1, temperature=0.5, min_p=0.3)
    got = transformed(logs(*probs), Transforms.of(sampling, 4), Strengths.of(sampling))
    assert kept(got) == [[0, 1]]


def test_penalties_come_before_temperature():
    sampling = Sampling(1, temperature=2.0, repetition_penalty=2.0, presence_penalty=0.5)
    made = jnp.array([[True, False]])
    got = transformed(
        jnp.array([[4.0, 1.0]]),
        Transforms.of(sampling, 2),
        Strengths.of(sampling),
        seen_BV=jnp.array([[True, True]]),
        made_BV=made,
    )
    np.testing.assert_allclose(got, [[0.75, 0.25]])  # (4 / 2 - 0.5) / 2 and (1 / 2) / 2


def test_transformers_has_the_same_distribution_after_all_of_them():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sampling = Sampling(1, temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2)
    seen = np.random.default_rng(1).integers(0, 97, (5, 20))
    seen_BV = np.zeros(RANDOM_BV.shape, bool)
    np.put_along_axis(seen_BV, seen, True, axis=1)
    args = (Transforms.of(sampling, 97), Strengths.of(sampling))
    ours = transformed(jnp.asarray(RANDOM_BV), *args, seen_BV=jnp.asarray(seen_BV))
    theirs = torch.from_numpy(RANDOM_BV.copy())
    for one in (
        transformers.RepetitionPenaltyLogitsProcessor(1.2),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(40),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.02),
    ):
        theirs = one(torch.from_numpy(seen), theirs)
    assert kept(ours) == kept(theirs.numpy())
    np.testing.assert_allclose(
        jax.nn.softmax(ours, -1), torch.softmax(theirs, -1).numpy(), atol=1e-6
    )


def test_greedy_takes_the_lowest_id_among_equals_and_penalties_move_it():
    greedy = Sampling(1, temperature=0.0)
    assert run([[1.0, 3.0, 3.0]], greedy)[0].tolist() == [1]
    penalised = dataclasses.replace(greedy, repetition_penalty=1.1)
    assert run([[1.0, 3.0, 3.0]], penalised, seen=jnp.array([[False, True, False]]))[
        0
    ].tolist() == [2]


def test_log_probabilities_are_the_models_own_whatever_is_done_to_the_logits():
    plain = Sampling(1, temperature=0.0, logprobs=True)
    bent = Sampling(1, temperature=0.3, top_k=1, repetition_penalty=3.0, logprobs=True)
    seen = jnp.zeros(RANDOM_BV.shape, bool).at[:, 3].set(True)
    for sampling in (plain, bent):
        token_B, logprob_B = run(RANDOM_BV, sampling, seen=seen)
        wide = RANDOM_BV.astype(np.float64)
        wanted = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
        np.testing.assert_allclose(logprob_B, wanted[np.arange(5), token_B], atol=2e-6)
        assert logprob_B.dtype == jnp.float32


@pytest.mark.parametrize(
    "sampling", [Sampling(1, temperature=0.0), Sampling(1, top_p=0.9, min_p=0.1)]
)
def test_rows_that_hold_no_number_give_no_token_and_leave_the_others_alone(sampling):
    nothing, broken, infinite = [-np.inf] * 3, [0.0, np.nan, 1.0], [0.0, np.inf, 1.0]
    sure = [-np.inf, 5.0, -np.inf]
    token_B, _ = run([nothing, broken, infinite, sure], sampling)
    assert token_B.tolist() == [NO_TOKEN, NO_TOKEN, NO_TOKEN, 1]


@pytest.mark.short
def test_draws_have_the_distributions_frequencies():
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    rows = np.broadcast_to(np.log(probs), (20_000, 4))
    token_B, _ = run(rows, Sampling(1))
    got = np.bincount(np.asarray(token_B), minlength=4) / 20_000
    np.testing.assert_allclose(got, probs, atol=4 * np.sqrt(0.25 / 20_000))
    token_B, _ = run(rows, Sampling(1, temperature=0.5, top_p=0.9))
    squares = np.array([25.0, 9, 0, 0]) / 34
    got = np.bincount(np.asarray(token_B), minlength=4) / 20_000
    np.testing.assert_allclose(got, squares, atol=4 * np.sqrt(0.25 / 20_000))


def test_a_draw_depends_on_seed_sample_and_position_and_not_on_its_row():
    logits_BV = jnp.zeros((4, 1000))

    def draws(seed, samples, positions):
        keys_B = sampler.row_keys(jnp.uint32(seed), jnp.array(samples), jnp.array(positions))
        return sampler.draw(logits_BV[: len(samples)], keys_B).tolist()

    first = draws(1, [0, 1, 0, 1], [5, 5, 6, 6])
    assert len(set(first)) == 4
    assert draws(1, [1, 0], [6, 5]) == [first[3], first[0]]
    assert draws(2, [0], [5]) != first[:1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0 must be above 0"),
        ({"temperature": -1.0}, "temperature: -1.0 is below"),
        ({"top_p": 0.0}, "top_p: 0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p: 1.5 is over"),
        ({"top_k": 0}, "top_k: 0 must be above"),
        ({"min_p": 1.1}, "min_p: 1.1 is over"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 must be above"),
        ({"presence_penalty": 3.0}, "presence_penalty: 3.0 is over"),
        ({"seed": -1}, "seed: -1 is below"),
        ({"stop_strings": ("a", "")}, "stop_strings: an empty string"),
        ({"temperature": 0.0, "top_k": 5}, "top_k: has no effect at temperature 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**{"max_new_tokens": 1, **options})
