"""Adam whose moments may be bfloat16, and may live in the host's memory.

bfloat16 moments are rounded stochastically, by bits that the seed and the update's number give, so
a restarted run makes the same ones. Offloaded moments are read and written back a layer at a time:
the device never holds more of them than one layer's, and at the end of a step none. The layers'
matrices and the embedding's go; norm scales are too small for it to pay.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.config.run import AdamWConfig
from llama_jax.optim.rounding import random_bits, stochastic_bfloat16

Moments = tuple[jax.Array, ...]  # the first and the second
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def scale_by_adam(config: AdamWConfig, seed: int) -> optax.GradientTransformationExtraArgs:
    """optax's `scale_by_adam`, its state included, with the config's moments.

    Its update takes `updated`, a boolean scalar: where False the moments stay as they were. For
    those on the device the caller's select does that, fused with the update; the host's can't be
    selected from without streaming them once more.
    """
    dtype = jnp.dtype(config.moments)

    def place(path: tuple[Any, ...], param: jax.Array) -> jax.Array:
        zeros = jnp.zeros_like(param, dtype)
        return jax.device_put(zeros, _HOST) if config.offload_moments and _goes(path) else zeros

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree_util.tree_map_with_path(place, params) for _ in range(2))
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    def update(
        updates: Any, state: Any, params: Any = None, *, updated: jax.Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        key = jax.random.fold_in(jax.random.key(seed), count)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        moments = zip(jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True)
        results = []
        for number, ((path, grad), pair) in enumerate(zip(leaves, moments, strict=True)):
            one = _one(config, count, jax.random.fold_in(key, number), updated)
            stream = _by_layer if _is_stacked(path) else _whole
            on_host = jax.typeof(pair[0]).memory_space == _HOST
            results.append(stream(one, grad, pair) if on_host else one(grad, pair, 0))
        scaled, pairs = zip(*results, strict=True)
        mu, nu = (treedef.unflatten(moment) for moment in zip(*pairs, strict=True))
        return treedef.unflatten(scaled), optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(init, update)


Leaf = Callable[[jax.Array, Moments, jax.typing.ArrayLike], tuple[jax.Array, Moments]]


def _one(config: AdamWConfig, count: jax.Array, key: jax.Array, updated: jax.Array | None) -> Leaf:
    """Adam for one array on the device, or one layer of it: the scaled update and new moments."""

    def one(
        grad: jax.Array, moments: Moments, layer: jax.typing.ArrayLike
    ) -> tuple[jax.Array, Moments]:
        mu, nu = (moment.astype(jnp.float32) for moment in moments)
        mu = config.b1 * mu + (1 - config.b1) * grad
        nu = config.b2 * nu + (1 - config.b2) * grad * grad
        mu_hat, nu_hat = (
            moment / (1 - beta**count) for moment, beta in ((mu, config.b1), (nu, config.b2))
        )
        new = (mu, nu)
        if config.moments == "bfloat16":
            # One draw for both: 16 bits each.
            bits = random_bits(jax.random.fold_in(key, layer), grad)
            new = stochastic_bfloat16(mu, bits), stochastic_bfloat16(nu, bits >> 16)
        if updated is not None and config.offload_moments:
            new = tuple(jnp.where(updated, *pair) for pair in zip(new, moments, strict=True))
        return mu_hat / (jnp.sqrt(nu_hat) + config.eps), new

    return one


def _whole(one: Leaf, grad: jax.Array, moments: Moments) -> tuple[jax.Array, Moments]:
    scaled, new = one(grad, _to(_DEVICE, moments), 0)
    return scaled, _to(_HOST, new)


def _by_layer(one: Leaf, grad: jax.Array, moments: Moments) -> tuple[jax.Array, Moments]:
    """`one` over the leading dim. The moments are carried: set in place, never a second copy."""

    def body(
        carry: tuple[jax.Array, Moments], grad: jax.Array
    ) -> tuple[tuple[jax.Array, Moments], jax.Array]:
        layer, moments = carry
        here = tuple(jax.lax.dynamic_index_in_dim(m, layer, 0, keepdims=False) for m in moments)
        scaled, new = one(grad, _to(_DEVICE, here), layer)
        moments = tuple(
            jax.lax.dynamic_update_index_in_dim(m, n, layer, 0)
            for m, n in zip(moments, _to(_HOST, new), strict=True)
        )
        return (layer + 1, moments), scaled

    (_, moments), scaled = jax.lax.scan(body, (jnp.int32(0), moments), grad)
    return scaled, moments


def _to(space: Any, moments: Moments) -> Moments:
    return tuple(jax.device_put(moment, space) for moment in moments)


def _goes(path: tuple[Any, ...]) -> bool:
    """Whether a parameter's moments are worth moving: those of matrices, told by name."""
    return not any(name.endswith(("norm", "bias")) for name in names_on(path))


def _is_stacked(path: tuple[Any, ...]) -> bool:
    return "layers" in names_on(path)


def names_on(path: tuple[Any, ...]) -> list[str]:
    """The names on a parameter's path, outermost first."""
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
