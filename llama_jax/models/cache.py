"""The key-value cache: what earlier tokens left for later ones to attend to.

All rows write to the same places: a row's padding leaves holes that no query sees, and one slice is
updated in place whatever the rows' lengths. Positions, which turn the rotary embedding, are the
tokens' own. B batch, K key-value heads, S places, H head dim, L layers, T new tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.config.model import ModelConfig
from llama_jax.sharding.rules import Dims, kv_head_copies, lay_out, on_shards, out_spec

STACK: Dims = ("layers", "batch", "kv_heads", "key_length", "head_dim")
ONE: Dims = STACK[1:]
NEW: Dims = ("batch", "key_length", "kv_heads", "head_dim")
PLACES: Dims = ("batch", "key_length")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers.

    Attributes:
      k: rotated keys, [L, B, K, S, H], or a tuple of [B, K, S, H] where the layers stand apart.
      v: values, likewise.
      segment_ids: int32 [B, S], 1 where a place holds a token, 0 where it holds a hole or nothing.
      filled: int32 scalar, how many places are taken, holes too; the next token's place.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    segment_ids: jax.Array
    filled: jax.Array


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What every layer needs to know of the tokens that a call adds.

    Attributes:
      cos, sin: of their positions, [B, T, R].
      segment_ids: int32 [B, T], 1, or 0 for a hole.
      kv_segment_ids: int32 [B, S], of all places, theirs among them.
      first: place of the first of them.
      fresh: nothing precedes them, so that the cache need not be read.
    """

    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array
    kv_segment_ids: jax.Array
    first: jax.Array
    fresh: bool


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values: [B, K, S, H], or the stack and this layer's number in it."""

    k: jax.Array
    v: jax.Array
    number: jax.Array | None = None

    def put(self, k_BTKH: jax.Array, v_BTKH: jax.Array, first: jax.Array) -> "LayerCache":
        """With T new tokens at the places from `first` on."""
        k, v = (_put(x, new, self.number, first) for x, new in ((self.k, k_BTKH), (self.v, v_BTKH)))
        return LayerCache(k, v, self.number)

    def keys_values(self) -> tuple[jax.Array, jax.Array]:
        """This layer's own, [B, K, S, H]."""
        if self.number is None:
            return self.k, self.v
        return _layer(self.k, self.number), _layer(self.v, self.number)


def init_cache(
    config: ModelConfig, batch_size: int, cache_len: int, dtype: str, *, stacked: bool
) -> KVCache:
    """An empty cache on the current mesh; call it inside `jax.jit`."""
    K, L = config.num_kv_heads * kv_head_copies(config.num_kv_heads), config.num_layers
    one = (batch_size, K, cache_len, config.head_dim)

    def zeros(shape: tuple[int, ...], dims: Dims) -> jax.Array:
        return jnp.zeros(shape, dtype, out_sharding=out_spec(dims, shape))

    def make() -> jax.Array | tuple[jax.Array, ...]:
        return zeros((L, *one), STACK) if stacked else tuple(zeros(one, ONE) for _ in range(L))

    places = (batch_size, cache_len)
    ids_BS = jnp.zeros(places, jnp.int32, out_sharding=out_spec(PLACES, places))
    return KVCache(make(), make(), ids_BS, jnp.zeros((), jnp.int32))


def put_segments(cache: KVCache, segment_ids_BT: jax.Array) -> jax.Array:
    """The cache's segment ids with those of the next T tokens."""

    def local(old_BS: jax.Array, new_BT: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old_BS, new_BT, (0, first))

    run = on_shards(local, (PLACES, PLACES, ()), PLACES)
    return run(cache.segment_ids, segment_ids_BT, cache.filled)


def take_rows(cache: KVCache, rows_R: jax.Array) -> KVCache:
    """A cache whose row i is row `rows_R[i]`; call it inside `jax.jit`."""

    def take(x: jax.Array, dims: Dims) -> jax.Array:
        batch = dims.index("batch")
        # Rows may come from any shard: gathered first, one layer (or stack) at a time.
        whole = lay_out(x, tuple(None if dim == "batch" else dim for dim in dims))
        return lay_out(jnp.take(whole, rows_R, axis=batch), dims)

    def each(x: jax.Array | tuple[jax.Array, ...]) -> jax.Array | tuple[jax.Array, ...]:
        return tuple(take(y, ONE) for y in x) if isinstance(x, tuple) else take(x, STACK)

    return KVCache(each(cache.k), each(cache.v), take(cache.segment_ids, PLACES), cache.filled)


def _put(
    cache: jax.Array, new_BTKH: jax.Array, number: jax.Array | None, first: jax.Array
) -> jax.Array:
    def local(
        cache: jax.Array, new_BTKH: jax.Array, first: jax.Array, *number: jax.Array
    ) -> jax.Array:
        new = new_BTKH.transpose(0, 2, 1, 3).astype(cache.dtype)
        new = new[None] if number else new
        return jax.lax.dynamic_update_slice(cache, new, (*number, 0, 0, first, 0))

    numbers = () if number is None else (number,)
    dims = STACK if numbers else ONE
    run = on_shards(local, (dims, NEW, (), *(() for _ in numbers)), dims)
    return run(cache, new_BTKH, first, *numbers)


def _layer(stack: jax.Array, number: jax.Array) -> jax.Array:
    def local(stack: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)

    return on_shards(local, (STACK, ()), ONE)(stack, number)
