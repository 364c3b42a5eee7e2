"""Logits of transformers' Llama with the same weights: stored ones always, live ones with torch."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_weights
from flax import nnx
from reference_weights import CASES, STORED
from tiny_models import F32, logits, make

pytestmark = pytest.mark.short

LOGITS = 2e-5


@functools.cache
def our_logits(name):
    config = CASES[name]
    model, mesh = make(config, F32)
    values = reference_weights.weights(config)
    state = nnx.state(model)
    for path, param in nnx.to_flat_state(state):
        with jax.set_mesh(mesh):
            spec = param[...].sharding
            param[...] = jax.device_put(jnp.asarray(values[".".join(map(str, path))]), spec)
    nnx.update(model, state)
    tokens_BT = reference_weights.tokens(config)
    places_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    batch = {
        "tokens": tokens_BT,
        "positions": places_BT,
        "segment_ids": np.ones_like(tokens_BT),
    }
    return logits(model, mesh, batch)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_stored_ones_of_transformers(name):
    stored = np.load(STORED)[name]
    assert stored.std() > 0.5
    np.testing.assert_allclose(our_logits(name), stored, atol=LOGITS)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' own
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="torch or transformers is not installed",
)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_installed_transformers(name):
    live = reference_weights.transformers_logits(CASES[name])
    np.testing.assert_allclose(live, np.load(STORED)[name], atol=LOGITS)
    np.testing.assert_allclose(our_logits(name), live, atol=LOGITS)
