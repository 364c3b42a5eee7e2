"""Optimizers as optax chains, and which parameters decay.

Every chain is: scale the gradient, add decayed weights, multiply by the schedule's rate; so decay
is in units of the learning rate (AdamW's decoupled decay) for all kinds. Clipping and skipping
belong to the step, which must see the norm first. Moments are float32 whatever the parameters are
(AdamW's also bfloat16, when asked for), and lie on the mesh as their parameters do.

Letters: L layers, D model width, N query heads, H head dim, F MLP width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.config.run import (
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
)
from llama_jax.optim.adam import names_on, scale_by_adam
from llama_jax.optim.schedule import Schedule

# Muon's matrices by parameter name: dims that the layer sums over, dims that it makes. Counted
# from the end, so that stacked layers [L, ...] are a batch of matrices.
_MUON_DIMS = {
    "q_proj": optax.contrib.MuonDimensionNumbers((-3,), (-2, -1)),  # D -> N H
    "k_proj": optax.contrib.MuonDimensionNumbers((-3,), (-2, -1)),
    "v_proj": optax.contrib.MuonDimensionNumbers((-3,), (-2, -1)),
    "o_proj": optax.contrib.MuonDimensionNumbers((-3, -2), (-1,)),  # N H -> D
    "gate_proj": optax.contrib.MuonDimensionNumbers((-2,), (-1,)),  # D -> F
    "up_proj": optax.contrib.MuonDimensionNumbers((-2,), (-1,)),
    "down_proj": optax.contrib.MuonDimensionNumbers((-2,), (-1,)),  # F -> D
}
# Root mean square of an orthogonalised update, matched to AdamW's so that one learning rate suits
# both groups (Muon is Scalable for LLM Training, arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2
_NO_DECAY = ("norm", "bias", "dora_scale")


def make_optimizer(
    config: OptimizerConfig, schedule: Schedule, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a run's `optimizer` table asks for; updates are float32.

    Its update may be told `updated`, whether the caller will take what it gives; see
    `llama_jax.optim.adam`.

    Args:
      seed: of the bits by which bfloat16 moments are rounded; without meaning for float32 ones.
    """
    if isinstance(config, AdamWConfig):
        return _in_float32(_adamw(config, schedule, seed))
    return _in_float32(_MAKERS[type(config)](config, schedule))


def decay_mask(params: Any) -> Any:
    """True for the parameters that decay: every matrix, embedding and head included, as in Llama.

    Norm scales, biases and DoRA's magnitudes never do. Told apart by name (`..._norm`, `..._bias`,
    `..._dora_scale`), not by the number of dims: layers are stacked, so a norm's scales are [L, D].
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(name.endswith(_NO_DECAY) for name in names_on(path)), params
    )


def restart_schedule(opt_state: Any) -> Any:
    """The optimizer state at the start of a new schedule (annealing): its moments, a count of 0.

    Adam's own count, which corrects the bias of young moments, belongs to the moments and stays.
    """
    return jax.tree.map(
        lambda node: (
            node._replace(count=jnp.zeros_like(node.count)) if _is_schedule(node) else node
        ),
        opt_state,
        is_leaf=_is_schedule,
    )


def schedule_count(opt_state: Any) -> jax.Array:
    """Updates applied under the current schedule: what the schedule is asked for next."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_schedule)
    return next(node.count for node in nodes if _is_schedule(node))


def _adamw(config: AdamWConfig, schedule: Schedule, seed: int) -> optax.GradientTransformation:
    return _with_decay(scale_by_adam(config, seed), config.weight_decay, schedule)


def _lion(config: LionConfig, schedule: Schedule) -> optax.GradientTransformation:
    return _with_decay(optax.scale_by_lion(config.b1, config.b2), config.weight_decay, schedule)


def _adafactor(config: AdafactorConfig, schedule: Schedule) -> optax.GradientTransformation:
    """Adafactor without momentum, updates clipped at 1 and scaled by the parameter's own size.

    Clipping and scaling see a stacked parameter as one block over all its layers.
    """
    scale = optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=config.decay_rate, min_dim_size_to_factor=config.min_dim_size_to_factor
        ),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return _with_decay(scale, config.weight_decay, schedule)


def _muon(config: MuonConfig, schedule: Schedule) -> optax.GradientTransformation:
    """Muon for the layers' matrices, AdamW for embedding, head and norm scales."""
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=config.ns_steps, beta=config.beta, weight_dimension_numbers=_muon_dims
        ),
        optax.stateless(lambda updates, _: _scale_to_rms(updates)),
        decay,
    )
    adam = optax.chain(
        optax.scale_by_adam(config.adam_b1, config.adam_b2), decay, optax.scale(config.adam_scale)
    )
    parts = optax.partition({"muon": muon, "adam": adam}, _muon_labels)
    return optax.chain(_by_partitioner(parts), optax.scale_by_learning_rate(schedule))


def _with_decay(
    scale: optax.GradientTransformation, weight_decay: float, schedule: Schedule
) -> optax.GradientTransformation:
    return optax.chain(
        scale,
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Bfloat16 parameters still get float32 moments: in bfloat16, b2 = 0.999 would round to 1."""
    extra = optax.with_extra_args_support(inner)

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda array: array.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        return extra.update(cast(updates), state, cast(params), **more)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(cast(params)), update)


def _by_partitioner(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with the compiler choosing the layout inside; outside, state and updates keep theirs.

    Newton-Schulz multiplies a matrix by its own transpose, which for a matrix split over both of
    its dims has no one right layout; explicit axes would ask for an answer at each product.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if jax.sharding.get_abstract_mesh().empty:
            return inner.update(updates, state, params)
        layout = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, (updates, state))
        by_partitioner: Any = jax.sharding.auto_axes(inner.update, out_sharding=layout)
        return by_partitioner(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _muon_labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _muon_name(path) else "adam", params
    )


def _muon_dims(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _MUON_DIMS[_muon_name(path)], params)


def _scale_to_rms(updates: Any) -> Any:
    def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        dims: Any = _MUON_DIMS[_muon_name(path)]
        sizes = [math.prod(update.shape[dim] for dim in side) for side in dims]
        return update * (_MUON_RMS * math.sqrt(max(sizes)))

    return jax.tree_util.tree_map_with_path(scale, updates)


def _muon_name(path: tuple[Any, ...]) -> str:
    """The name on the path that is one of Muon's matrices; empty when none is."""
    return next((name for name in names_on(path) if name in _MUON_DIMS), "")


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


_MAKERS: dict[type, Callable[[Any, Schedule], optax.GradientTransformation]] = {
    AdafactorConfig: _adafactor,
    LionConfig: _lion,
    MuonConfig: _muon,
}
