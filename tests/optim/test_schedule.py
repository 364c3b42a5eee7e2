"""Learning rates typed out, update by update."""

import numpy as np
import optax
import pytest

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import ScheduleConfig
from llama_jax.optim.schedule import make_schedule

pytestmark = pytest.mark.short


def rates(steps, **fields):
    schedule = make_schedule(ScheduleConfig(**{"peak": 1.0, **fields}), steps)
    return [float(schedule(count)) for count in range(steps)]


def test_warmup_stable_decay_wastes_no_update_and_ends_at_zero():
    actual = rates(
        10, kind="warmup_stable_decay", warmup_steps=4, decay_steps=4, final_fraction=0.0
    )
    assert actual == [0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "constant"}, [1, 1, 1, 1]),
        ({"kind": "constant", "warmup_steps": 2}, [0.5, 1, 1, 1]),
        ({"kind": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1]),
        ({"kind": "linear", "final_fraction": 0.25}, [1, 0.75, 0.5, 0.25]),
        ({"kind": "linear", "warmup_steps": 2, "final_fraction": 0.0}, [0.5, 1, 0.5, 0]),
        ({"kind": "linear", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1]),
        ({"kind": "anneal"}, [1, 2 / 3, 1 / 3, 0]),
        ({"kind": "warmup_stable_decay"}, [1, 1, 1, 1]),
        ({"kind": "warmup_stable_decay", "decay_steps": 1}, [1, 1, 1, 0.1]),
        ({"kind": "warmup_stable_decay", "warmup_steps": 2, "decay_steps": 2}, [0.5, 1, 0.55, 0.1]),
        ({"kind": "cosine", "final_fraction": 0.0}, [1, 0.75, 0.25, 0]),
        ({"kind": "cosine", "warmup_steps": 1, "final_fraction": 0.5}, [1, 0.875, 0.625, 0.5]),
    ],
)
def test_every_rate_of_a_four_update_run(fields, expected):
    np.testing.assert_allclose(rates(4, **fields), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "anneal"])
def test_a_decay_to_zero_ends_at_exactly_zero(kind):
    end = {} if kind == "anneal" else {"final_fraction": 0.0}
    assert rates(1000, kind=kind, **end)[-1] == 0.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "warmup_stable_decay", "anneal"])
def test_a_run_of_one_update_uses_the_peak(kind):
    assert rates(1, kind=kind, peak=0.5) == [0.5]


def test_cosine_is_optaxs_shifted_by_the_update_that_optax_spends_at_zero():
    ours = rates(100, peak=3e-4, warmup_steps=10, final_fraction=0.1)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 10, decay_steps=100, end_value=3e-5)
    np.testing.assert_allclose(ours, [theirs(count + 1) for count in range(100)], rtol=1e-5)


def test_the_rate_stays_after_the_last_update():
    schedule = make_schedule(ScheduleConfig(peak=1.0, kind="linear"), 4)
    assert float(schedule(3)) == float(schedule(100)) == pytest.approx(0.1)


def test_parts_longer_than_the_run_are_an_error():
    config = ScheduleConfig(peak=1.0, kind="warmup_stable_decay", warmup_steps=4, decay_steps=4)
    with pytest.raises(ConfigError, match="warm-up and decay take 8 steps, the run has 7"):
        make_schedule(config, 7)
