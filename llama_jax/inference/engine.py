"""A model made ready: prefill into a cache, and the decoding that goes on from there.

Prefill takes all but the last token of each prompt and computes no logits; the last token is
decoding's first input. So the first token of a completion is sampled, and tested for an end, by
the same code as all others, and prefill is the same program whatever the sampling.
B batch, T tokens of a chunk, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llama_jax.inference.decoding import Decoding, State, decode, make_settings
from llama_jax.inference.sampler import Transforms
from llama_jax.inference.sampling import Sampling
from llama_jax.models.cache import KVCache, init_cache, take_rows
from llama_jax.models.llama import Llama
from llama_jax.models.unstacking import for_generation
from llama_jax.sharding.rules import act_spec


class Engine:
    """A model ready to be run; shapes are the caller's business, `buckets.py` has them."""

    def __init__(self, model: Llama, mesh: Mesh, *, stacked: bool) -> None:
        self.config, self.mesh = model.config, mesh
        self._dtype = model.execution.compute_dtype
        self._stacked = stacked
        graphdef, params = nnx.split(for_generation(model, mesh, stacked=stacked))
        # A flat tuple: taking the model's tree apart anew would cost each dispatch milliseconds.
        leaves, treedef = jax.tree.flatten(params)
        self._params = tuple(leaves)

        def rebuild(params: tuple[jax.Array, ...]) -> Llama:
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, params))

        self._first = jax.jit(functools.partial(self._prefill_first, rebuild), static_argnums=3)
        self._next = jax.jit(functools.partial(_prefill, rebuild), donate_argnums=1)
        self._fan_out = jax.jit(take_rows)
        self._decode = jax.jit(
            functools.partial(decode, rebuild), static_argnums=4, donate_argnums=1
        )

    def prefill(
        self, prompts: Sequence[Sequence[int]], rows: int, chunks: Sequence[int], cache_len: int
    ) -> KVCache:
        """A cache of all but the last token of each prompt; rows past the prompts are empty.

        Args:
          rows: B, at least the number of prompts.
          chunks: tokens of each call; their sum covers the longest prompt but for its last token.
          cache_len: places of the cache; at least the chunks' sum.
        """
        held_B = np.zeros(rows, np.int32)
        held_B[: len(prompts)] = [len(prompt) - 1 for prompt in prompts]
        tokens_BP = np.zeros((rows, sum(chunks)), np.int32)
        for row, prompt in zip(tokens_BP, prompts, strict=False):
            row[: len(prompt) - 1] = prompt[:-1]
        with jax.set_mesh(self.mesh):
            cache = self._first(self._params, tokens_BP[:, : chunks[0]], held_B, cache_len)
            start = chunks[0]
            for length in chunks[1:]:
                part_BT = tokens_BP[:, start : start + length]
                cache = self._next(self._params, cache, part_BT, held_B)
                start += length
        return cache

    def fan_out(self, cache: KVCache, rows_B: np.ndarray) -> KVCache:
        """A cache whose row i is row `rows_B[i]` (int32) of the given one."""
        with jax.set_mesh(self.mesh):
            return self._fan_out(cache, rows_B)

    def begin(
        self,
        cache: KVCache,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int],
        sampling: Sampling,
        *,
        vocab_size: int,
        filled: int,
    ) -> "Decoding":
        """Decoding from where prefill ended.

        Args:
          cache: given up; of all but the last token of each prompt. Its rows past the prompts
            are idle.
          samples: which sample of its prompt each row is.
          vocab_size: ids from here on are never drawn.
          filled: how many of the cache's places are taken.
        """
        rows, cache_len = cache.segment_ids.shape
        transforms = Transforms.of(sampling, self.config.vocab_size)
        shape = (rows, self.config.vocab_size)
        seen_BV = np.zeros(shape, bool) if transforms.repetition else None
        made_BV = np.zeros(shape, bool) if transforms.presence else None
        token_B, position_B, sample_B = np.zeros((3, rows), np.int32)
        for row, (ids, number) in enumerate(zip(prompts, samples, strict=True)):
            token_B[row], position_B[row], sample_B[row] = ids[-1], len(ids) - 1, number
            if seen_BV is not None:
                seen_BV[row, list(ids)] = True
        done_B = np.arange(rows) >= len(prompts)
        with jax.set_mesh(self.mesh):
            one_each = (self._by_rows(x) for x in (token_B, position_B, sample_B, done_B))
            counts = (None if x is None else self._by_rows(x) for x in (seen_BV, made_BV))
            state = State(cache, *one_each, *counts)
        settings = make_settings(sampling, vocab_size)
        run = functools.partial(self._decode, self._params)
        return Decoding(run, self.mesh, state, settings, transforms, cache_len - filled)

    def _by_rows(self, x: np.ndarray) -> jax.Array:
        spec = act_spec(("batch", *(None,) * (x.ndim - 1)), x.shape)
        return jax.device_put(x, NamedSharding(self.mesh, spec))

    def _prefill_first(
        self,
        rebuild: Any,
        params: tuple[jax.Array, ...],
        tokens_BT: jax.Array,
        held_B: jax.Array,
        cache_len: int,
    ) -> KVCache:
        rows = tokens_BT.shape[0]
        cache = init_cache(self.config, rows, cache_len, self._dtype, stacked=self._stacked)
        return _prefill(rebuild, params, cache, tokens_BT, held_B, fresh=True)


def _prefill(
    rebuild: Any,
    params: tuple[jax.Array, ...],
    cache: KVCache,
    tokens_BT: jax.Array,
    held_B: jax.Array,
    fresh: bool = False,
) -> KVCache:
    # Until decoding begins, a place in the cache is a position in every row.
    places_BT = jnp.broadcast_to(
        cache.filled + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape
    )
    segment_ids_BT = (places_BT < held_B[:, None]).astype(jnp.int32)
    _, cache = rebuild(params).extend(
        tokens_BT, cache, positions_BT=places_BT, segment_ids_BT=segment_ids_BT, fresh=fresh
    )
    return cache
