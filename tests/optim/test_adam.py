"""Adam's moments: as optax's in float32, rounded in bfloat16, the same wherever they live."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config.run import AdamWConfig
from llama_jax.optim.adam import scale_by_adam

L, D, F, V = 3, 8, 16, 24
SPECS = {
    "embedding": ((V, D), P("b", "a")),
    "layers": {
        "mlp_norm": {"scale": ((L, D), P(None, None))},
        "mlp": {"up_proj": ((L, D, F), P(None, "a", "b"))},
    },
}


def tree(seed, mesh=None):
    keys = iter(jax.random.split(jax.random.key(seed), 3))

    def make(entry):
        value = jax.random.normal(next(keys), entry[0])
        return value if mesh is None else jax.device_put(value, NamedSharding(mesh, entry[1]))

    return jax.tree.map(make, SPECS, is_leaf=lambda node: isinstance(node, tuple))


def mesh_of(sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, ("a", "b"), axis_types=(AxisType.Explicit,) * 2, devices=devices)


def run(config, steps=4, mesh=None, seed=0, updated=None):
    """Updates and state of some steps, as NumPy; and the state's arrays."""
    transform = scale_by_adam(config, seed)
    updated = [True] * steps if updated is None else updated
    with jax.set_mesh(mesh or mesh_of((1, 1))):
        grads = [tree(step, mesh or mesh_of((1, 1))) for step in range(steps)]
        state = jax.jit(transform.init)(grads[0])
        step = jax.jit(lambda g, s, u: transform.update(g, s, updated=u), donate_argnums=(0, 1))
        for grad, flag in zip(grads, updated, strict=True):
            updates, state = step(grad, state, jnp.bool_(flag))
    return jax.tree.map(np.asarray, (updates, state)), state


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_in_float32_it_is_optax_scale_by_adam():
    config = AdamWConfig(b1=0.8, b2=0.9, eps=1e-6)
    got, _ = run(config)
    transform = optax.scale_by_adam(0.8, 0.9, 1e-6)
    state = transform.init(tree(0))
    for step in range(4):
        updates, state = transform.update(tree(step), state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, (updates, state)
    )


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_offloaded_moments_are_those_of_the_device_and_lie_on_the_host(moments):
    config = AdamWConfig(moments=moments, offload_moments=True)
    got, state = run(config, mesh=mesh_of((2, 2)))
    for moment in (state.mu, state.nu):
        kinds = jax.tree.map(lambda array: array.sharding.memory_kind, moment)
        assert kinds["embedding"] == kinds["layers"]["mlp"]["up_proj"] == "pinned_host"
        assert kinds["layers"]["mlp_norm"]["scale"] == "device"
        assert {leaf.dtype.name for leaf in jax.tree.leaves(moment)} == {moments}
    near, _ = run(AdamWConfig(moments=moments), mesh=mesh_of((2, 2)))
    # Rounding draws its bits a layer at a time there, so only the odds are the same.
    tolerance = 1e-6 if moments == "float32" else 2**-6
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(near), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
def test_rounded_moments_depend_on_seed_and_step_and_not_on_the_mesh(offload):
    config = AdamWConfig(moments="bfloat16", offload_moments=offload)
    alone, _ = run(config)
    for sizes in ((4, 1), (2, 4)):
        updates, state = run(config, mesh=mesh_of(sizes))[0]
        same((state.mu, state.nu), (alone[1].mu, alone[1].nu))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, alone[0])
    other, _ = run(config, seed=1)
    mu, other_mu = (s.mu["layers"]["mlp"]["up_proj"] for s in (alone[1], other[1]))
    assert 0.2 < (mu != other_mu).mean() < 0.8
    # Unbiased: over the entries the rounding error of one step has no sign.
    exact, _ = run(AdamWConfig(), steps=1)
    error = np.concatenate(
        [
            (np.float64(a) - b).ravel() / np.spacing(np.abs(b).ravel() * 2.0**16)
            for a, b in zip(
                jax.tree.leaves(run(config, steps=1)[0][1].mu),
                jax.tree.leaves(exact[1].mu),
                strict=True,
            )
        ]
    )
    assert np.abs(error).max() < 1
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size)


def test_layers_get_bits_of_their_own():
    config = AdamWConfig(moments="bfloat16", offload_moments=True)
    transform = scale_by_adam(config, 0)
    params = {"layers": {"up_proj": jnp.full((L, D, F), 1.234567)}}
    _, state = transform.update(params, transform.init(params))
    layers = np.asarray(state.mu["layers"]["up_proj"])
    assert not np.array_equal(layers[0], layers[1])


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_moments_on_the_host_stay_where_an_update_is_not_taken(moments):
    config = AdamWConfig(moments=moments, offload_moments=True)
    before, _ = run(config, steps=2)
    after, _ = run(config, steps=3, updated=[True, True, False])
    same((after[1].mu, after[1].nu), (before[1].mu, before[1].nu))
