"""The running average of the weights: its numbers, and that evaluations and readers get it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from test_run import config_with
from test_step import Linear, one_device, rows, weighted_rows

from llama_jax.config.run import ScheduleConfig, TrainingConfig
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.orbax_arrays import StackedArrays
from llama_jax.optim.schedule import make_schedule
from llama_jax.training.networks import Networks
from llama_jax.training.run import train
from llama_jax.training.state import best_params, init_state
from llama_jax.training.step import make_train_step


def test_the_average_follows_the_weights_by_the_formula_and_stands_still_where_a_step_is_skipped():
    graphdef, params = nnx.split(Linear(jnp.asarray([1.0, 2.0])))
    params = jax.device_put(params, jax.NamedSharding(one_device(), jax.P()))
    schedule = make_schedule(ScheduleConfig(peak=1.0, kind="constant"), 9)
    optimizer = optax.sgd(schedule)
    config = TrainingConfig(steps=9, clip_norm=None, ema_decay=0.25)
    step = make_train_step(Networks(graphdef), weighted_rows, optimizer, schedule, config)
    state = init_state(params, optimizer, jax.random.key(0), average=True)
    assert best_params(state) is state.averaged
    weights, average, updates = np.array([1.0, 2.0]), np.array([1.0, 2.0]), 0
    for mask in ([1, 1], [1, 0], [0, 0], [1, 1]):
        state, _ = step(state, rows([[0, 1]], [[0.5, -1.0]], [mask]))
        if sum(mask):
            updates += 1
            keep = min(0.25, (1 + updates) / (10 + updates))
            weights = weights - np.array([0.5, -1.0]) * mask / sum(mask)
            average = keep * average + (1 - keep) * weights
        np.testing.assert_allclose(state.params["weight"][...], weights, rtol=1e-6)
        np.testing.assert_allclose(state.averaged["weight"][...], average, rtol=1e-6)


def test_a_run_that_averages_gives_its_average_away_and_goes_on_from_its_weights(tmp_path):
    config = config_with("training.ema_decay=0.5")
    train(config, tmp_path, Console(quiet=True))
    source = open_source(tmp_path)
    folder = source.path.absolute() / "state"
    values = [
        StackedArrays(folder, config.model, prefix=prefix).tensors()["final_norm.scale"].read_all()
        for prefix in ("averaged.", "params.")
    ]
    given = source.tensors["final_norm.scale"].read_all()
    np.testing.assert_array_equal(given, values[0])
    assert not np.array_equal(given, values[1])
