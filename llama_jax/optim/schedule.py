"""The learning rate as a function of the update count.

Updates are optimizer steps, however many microbatches each takes, and are counted from 1 in the
config: update `warmup_steps` is the first at `peak`, so no update is wasted at a rate of 0. A
zero-length warm-up starts at the peak; a zero-length decay never leaves it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import ScheduleConfig

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
Decay = Callable[[jax.Array], jax.Array]


def make_schedule(config: ScheduleConfig, steps: int) -> Schedule:
    """The schedule of a run of `steps` updates: from the 0-based count that optax keeps to a rate.

    After the last update the rate stays where it ended.

    Raises:
      ConfigError: warm-up and decay are together longer than the run.
    """
    used = config.warmup_steps + config.decay_steps
    if used > steps:
        raise ConfigError(
            f"warm-up and decay take {used} steps, the run has {steps}", key="schedule.warmup_steps"
        )
    # The last update at the peak; the decay runs from there to the last update of the run.
    peak_until = max(config.warmup_steps, 1)
    if config.kind == "warmup_stable_decay":
        peak_until = max(steps - config.decay_steps, peak_until)
    decay = _DECAYS[config.kind](config)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(count, jnp.float32) + 1.0
        warm_up = jnp.minimum(update / max(config.warmup_steps, 1), 1.0)
        # With nothing to decay over, the only update past the peak is past the run's end.
        past = (update - peak_until) / max(steps - peak_until, 1)
        left = decay(jnp.clip(past, 0.0, 1.0)) if steps > peak_until else 1.0
        return jnp.float32(config.peak) * jnp.minimum(warm_up, left)

    return schedule


def _cosine(config: ScheduleConfig) -> Decay:
    def decay(progress: jax.Array) -> jax.Array:
        # sin^2 of the half angle instead of (1 + cos) / 2, which in float32 misses 0 by 1e-8.
        share = jnp.sin(0.5 * math.pi * (1.0 - progress)) ** 2
        return config.end_fraction + (1.0 - config.end_fraction) * share

    return decay


def _linear(config: ScheduleConfig) -> Decay:
    return lambda progress: config.end_fraction + (1.0 - config.end_fraction) * (1.0 - progress)


_DECAYS: dict[str, Callable[[ScheduleConfig], Decay]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": lambda config: jnp.ones_like,
    "warmup_stable_decay": _linear,
    "anneal": lambda config: lambda progress: 1.0 - progress,
}
