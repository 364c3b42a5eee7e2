"""Decode steps that stay on the device: sampling, stop ids and several steps a dispatch.

B batch, V vocabulary, C steps of a dispatch at most, M stop ids.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.inference.completions import InferenceError
from llama_jax.inference.sampler import (
    IDLE,
    NO_TOKEN,
    Strengths,
    Transforms,
    row_keys,
    sample,
)
from llama_jax.inference.sampling import Sampling
from llama_jax.models.cache import KVCache
from llama_jax.models.llama import Llama
from llama_jax.sharding.rules import Dims, lay_out, on_shards

# Steps that one dispatch can take: the device isn't kept waiting for the host between them.
STEPS = 16
ROW: Dims = ("batch",)
ROWS_V: Dims = ("batch", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where each row is.

    Attributes:
      cache: of all tokens but the last.
      token: int32 [B], each row's last.
      position: int32 [B], its place in the row's own sequence.
      sample: int32 [B], which sample of its prompt a row is.
      done: bool [B], rows that take no more tokens.
      seen: bool [B, V], tokens of prompt and completion; None where no transform asks for them.
      made: bool [B, V], tokens of the completion; None likewise.
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    sample: jax.Array
    done: jax.Array
    seen: jax.Array | None
    made: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Numbers of a request that its program takes as arguments."""

    strengths: Strengths
    seed: Any  # uint32
    stop_ids: Any  # int32 [M]; -1 fills up
    vocab_size: Any  # int32: ids from here on have no text and are never drawn


def make_settings(sampling: Sampling, vocab_size: int) -> Settings:
    """A request's numbers; `vocab_size` ids have text."""
    # So many places for stop ids that one program serves every model's own.
    places = max(8, 1 << max(len(sampling.stop_ids) - 1, 0).bit_length())
    stop_ids_M = np.full(places, NO_TOKEN, np.int32)
    stop_ids_M[: len(sampling.stop_ids)] = sorted(sampling.stop_ids)
    strengths = jax.tree.map(np.float32, Strengths.of(sampling))
    return Settings(strengths, np.uint32(sampling.seed), stop_ids_M, np.int32(vocab_size))


class Emitted(NamedTuple):
    """Tokens, int32 [B, C], and their log-probabilities; `IDLE` where a row was finished."""

    tokens: jax.Array
    logprobs: jax.Array


class Decoding:
    """Rows on their way: each call of `step` sends the device on."""

    def __init__(
        self,
        run: Callable[..., tuple[State, Emitted]],
        mesh: Mesh,
        state: State,
        settings: Settings,
        transforms: Transforms,
        free: int,
    ) -> None:
        self._run, self._mesh, self._state = run, mesh, state
        self._settings, self._transforms, self._free = settings, transforms, free

    @property
    def rows(self) -> int:
        """B."""
        return self._state.token.shape[0]

    def step(self, steps: int, ended_B: np.ndarray) -> Emitted:
        """Up to `steps` (at most `STEPS`) tokens of each row; fewer where all rows end.

        Returns at once: the arrays are ready when the device is.

        Args:
          ended_B: rows that the host has ended.

        Raises:
          InferenceError: the cache has no room for so many.
        """
        if steps > self._free:
            raise InferenceError(
                f"{steps} more tokens, but the cache has {self._free} free places of "
                f"{self._state.cache.segment_ids.shape[1]}"
            )
        self._free -= steps
        with jax.set_mesh(self._mesh):
            request = (self._settings, np.int32(steps))
            self._state, emitted = self._run(self._state, ended_B, request, self._transforms)
        return emitted


def decode(
    rebuild: Callable[[tuple[jax.Array, ...]], Llama],
    params: tuple[jax.Array, ...],
    state: State,
    ended_B: jax.Array,
    request: tuple[Settings, jax.Array],
    transforms: Transforms,
) -> tuple[State, Emitted]:
    """What `Decoding.step` runs, to be compiled; `request` has the number of steps as well."""
    settings, steps = request
    model = rebuild(params)
    ended_B = lay_out(ended_B, ROW)
    state = dataclasses.replace(state, done=state.done | ended_B)
    shape = (ended_B.shape[0], STEPS)
    start = Emitted(
        lay_out(jnp.full(shape, IDLE, jnp.int32), ROWS_V),
        lay_out(jnp.zeros(shape, jnp.float32), ROWS_V),
    )

    def going_on(carry: tuple[jax.Array, State, Emitted]) -> jax.Array:
        number, state, _ = carry
        return (number < steps) & ~state.done.all()

    def step(carry: tuple[jax.Array, State, Emitted]) -> tuple[jax.Array, State, Emitted]:
        number, state, emitted = carry
        state, new = _step(model, state, settings, transforms)
        put = jax.lax.dynamic_update_slice_in_dim
        pairs = zip(emitted, new, strict=True)
        return number + 1, state, Emitted(*(put(x, y[:, None], number, 1) for x, y in pairs))

    _, state, emitted = jax.lax.while_loop(going_on, step, (jnp.int32(0), state, start))
    # Every host reads all rows.
    return state, Emitted(*(lay_out(x, (None, None)) for x in emitted))


def _step(
    model: Llama, state: State, settings: Settings, transforms: Transforms
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    x_B1D, cache = model.extend(
        state.token[:, None],
        state.cache,
        positions_BT=state.position[:, None],
        segment_ids_BT=(~state.done).astype(jnp.int32)[:, None],
    )
    logits_BV = lay_out(model.logits(x_B1D), ("batch", "length", None))[:, 0]
    position_B = state.position + 1
    token_B, logprob_B = _sample(logits_BV, position_B, state, settings, transforms)
    stops_B = (token_B[:, None] == settings.stop_ids[None]).any(-1) | (token_B < 0)
    going_B = ~state.done
    state = State(
        cache=cache,
        token=jnp.where(going_B, token_B, state.token),
        position=jnp.where(going_B, position_B, state.position),
        sample=state.sample,
        done=state.done | stops_B,
        seen=_with(state.seen, token_B, going_B),
        made=_with(state.made, token_B, going_B),
    )
    return state, (jnp.where(going_B, token_B, IDLE), jnp.where(going_B, logprob_B, 0.0))


def _with(counted_BV: jax.Array | None, token_B: jax.Array, going_B: jax.Array) -> Any:
    """The rows' tokens added to those counted, where anything is."""
    if counted_BV is None:
        return None
    new_BV = token_B[:, None] == jnp.arange(counted_BV.shape[1])
    return counted_BV | (new_BV & going_B[:, None])


def _sample(
    logits_BV: jax.Array,
    position_B: jax.Array,
    state: State,
    settings: Settings,
    transforms: Transforms,
) -> tuple[jax.Array, jax.Array]:
    """`sample`, on each device's rows."""
    counts = [x for x in (state.seen, state.made) if x is not None]
    strengths, treedef = jax.tree.flatten(settings.strengths)
    numbers = [settings.seed, settings.vocab_size, *strengths]

    def local(
        logits_BV: jax.Array, position_B: jax.Array, sample_B: jax.Array, *rest: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        (seed, vocab_size, *strengths), counts = rest[: len(numbers)], list(rest[len(numbers) :])
        return sample(
            logits_BV,
            row_keys(seed, sample_B, position_B),
            transforms,
            jax.tree.unflatten(treedef, strengths),
            vocab_size=vocab_size,
            seen_BV=counts.pop(0) if state.seen is not None else None,
            made_BV=counts.pop(0) if state.made is not None else None,
        )

    dims = (ROWS_V, ROW, ROW, *[()] * len(numbers), *[ROWS_V] * len(counts))
    arrays = [jnp.asarray(x) for x in numbers]
    return on_shards(local, dims, ROW)(logits_BV, position_B, state.sample, *arrays, *counts)
