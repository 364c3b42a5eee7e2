"""The decoder: embedding, L layers, final norm, head.

B batch, T length, D width, V vocabulary, L layers (stacked in one array a parameter),
R = head dim / 2.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import ExecutionConfig
from llama_jax.models import attention, mlp
from llama_jax.models.attention import Attention
from llama_jax.models.cache import KVCache, LayerCache, NewTokens, put_segments
from llama_jax.models.embedding import look_up
from llama_jax.models.lora import add_adapters
from llama_jax.models.mlp import MLP
from llama_jax.models.narrow import Narrow, settled_together
from llama_jax.models.narrow import cast as cast_weight
from llama_jax.models.norm import RMSNorm
from llama_jax.models.params import weight
from llama_jax.models.remat import rematerialized
from llama_jax.models.rope import rotations
from llama_jax.models.split_matrix import SplitMatrix
from llama_jax.sharding.rules import (
    Dims,
    at_use,
    axis_size,
    lay_out,
    out_spec,
)
from llama_jax.sharding.zigzag import from_zigzag, to_zigzag

VOCAB_IN: Dims = ("vocab", "embed")
VOCAB_OUT: Dims = ("embed", "vocab")
TOKENS: Dims = ("batch", "length")
ACT: Dims = ("batch", "length", "embed")
RESIDUAL: Dims = ("batch", "residual_length", "embed")
LOGITS: Dims = ("batch", "length", "vocab")


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        execution: ExecutionConfig,
        adapter: AdapterConfig | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        D, eps, dtype = config.embed_dim, config.norm_eps, execution.param_dtype
        self.attn_norm = RMSNorm(D, eps, dtype, "attn_norm")
        self.attention = Attention(config, execution, rngs=rngs)
        self.mlp_norm = RMSNorm(D, eps, dtype, "mlp_norm")
        self.mlp = MLP(config, execution, rngs=rngs)
        if adapter is not None:
            # Last, so that the weights are those of the same seed without it.
            add_adapters(self.attention, attention.WEIGHTS, adapter, rngs=rngs)
            add_adapters(self.mlp, mlp.WEIGHTS, adapter, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        cos_BTR: jax.Array,
        sin_BTR: jax.Array,
        segment_ids_BT: jax.Array,
    ) -> jax.Array:
        """[B, T, D] in x's dtype."""
        # Names are those that a remat policy may keep; see llama_jax.models.remat.
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        normal_BTD = checkpoint_name(self.attn_norm(x_BTD), "attn_norm")
        x_BTD = x_BTD + self.attention(normal_BTD, cos_BTR, sin_BTR, segment_ids_BT)
        return x_BTD + self.mlp(checkpoint_name(self.mlp_norm(x_BTD), "mlp_norm"))

    def extend(
        self, x_BTD: jax.Array, new: NewTokens, kv: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        """The same over a cache, and the cache with the new tokens in it."""
        out_BTD, kv = self.attention.extend(self.attn_norm(x_BTD), new, kv)
        x_BTD = x_BTD + out_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), kv


class Llama(nnx.Module):
    """A dense Llama. Construct it under `jax.set_mesh(mesh)` for sharded parameters."""

    def __init__(
        self,
        config: ModelConfig,
        execution: ExecutionConfig,
        adapter: AdapterConfig | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.execution, self.adapter = config, execution, adapter
        D, V, dtype = config.embed_dim, config.vocab_size, execution.param_dtype
        self.embedding = weight(rngs, "embedding", VOCAB_IN, (V, D), config.init_std, dtype)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, execution, adapter, rngs=rngs)

        self.layers = stack(rngs)
        self.final_norm = RMSNorm(D, config.norm_eps, dtype, "final_norm")
        if config.head == "scalar":
            # The spread of a reward model's head in summarisation from feedback (arXiv 2009.01325).
            std = 1 / math.sqrt(D + 1)
            self.reward_head = weight(rngs, "reward_head", ("norm",), (D,), std, "float32")
        elif not config.tie_embeddings:
            self.lm_head = weight(rngs, "lm_head", VOCAB_OUT, (D, V), config.init_std, dtype)

    def __call__(
        self, tokens_BT: jax.Array, *, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        """float32 logits [B, T, V] of rows in natural order; a reward model's rewards [B, T].

        Arguments as for `hidden`.
        """
        tokens_BT, positions_BT, segment_ids_BT = to_zigzag(
            (tokens_BT, positions_BT, segment_ids_BT)
        )
        x_BTD = self.hidden(tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT)
        x_BTD = from_zigzag(lay_out(x_BTD, ACT), ACT)
        return self.logits(x_BTD) if self.config.head == "vocab" else self.rewards(x_BTD)

    def rewards(self, x_BTD: jax.Array) -> jax.Array:
        """float32 [B, T], the reward of each row up to each token, of what `hidden` gave.

        Raises:
          ConfigError: the head is the vocabulary's.
        """
        if self.config.head != "scalar":
            raise ConfigError("'vocab' gives no rewards; 'scalar' does", key="model.head")
        # Not a matrix product, whose operands a TPU would round to bfloat16.
        rewards_BT = jnp.sum(x_BTD.astype(jnp.float32) * self.reward_head[...], axis=-1)
        return lay_out(rewards_BT, TOKENS)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V] of what `hidden` or `extend` gave.

        Raises:
          ConfigError: a reward model.
        """
        self._check_vocab_head()
        head = (self.embedding if self.config.tie_embeddings else self.lm_head)[...]
        if isinstance(head, SplitMatrix):
            return head.product(x_BTD, ACT, LOGITS)
        layout = out_spec(LOGITS, (*x_BTD.shape[:2], self.config.vocab_size))
        return jnp.einsum(
            "BTD,DV->BTV",
            x_BTD,
            self.head_DV(),
            preferred_element_type=jnp.float32,
            out_sharding=layout,
        )

    def hidden(
        self, tokens_BT: jax.Array, *, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        """What the head reads: [B, T, D] after the final norm, in the compute dtype.

        Where the mesh splits rows over its context axis, arguments and result are in the order of
        `sharding.zigzag.to_zigzag`: an objective puts its whole batch in it, once. The result lies
        as the residual stream does, its length split over the tensor axis too.

        Args:
          tokens_BT: ids; rows may hold several documents.
          positions_BT: place of each token in its document, from 0.
          segment_ids_BT: which document of the row a token belongs to, from 1; 0 is padding.
            Padding reaches no other token, and its own outputs mean nothing.

        Raises:
          ConfigError: T is over `max_seq_len`, or the mesh doesn't divide B or T.
        """
        if tokens_BT.shape[1] > self.config.max_seq_len:
            raise ConfigError(
                f"a sequence of {tokens_BT.shape[1]} tokens is longer than the model's "
                f"max_seq_len, {self.config.max_seq_len}",
                key="model.max_seq_len",
            )
        tokens_BT, positions_BT, segment_ids_BT = (
            lay_out(x, TOKENS, "batch") for x in (tokens_BT, positions_BT, segment_ids_BT)
        )
        cos_BTR, sin_BTR = rotations(self.config.rope, self.config.head_dim, positions_BT)
        x_BTD = self._run_layers(self._embed(tokens_BT), cos_BTR, sin_BTR, segment_ids_BT)
        return self.final_norm(x_BTD)

    def extend(
        self,
        tokens_BT: jax.Array,
        cache: KVCache,
        *,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        fresh: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """What the head reads after the next T tokens of each row, and the cache with them in it.

        Args:
          tokens_BT: ids that go into the cache's next T places. The caller sees to it that there
            are as many: a write past the end would land on the last ones.
          cache: of earlier calls, or empty; stacked or in layers, as the model's layers are.
          positions_BT: place of each token in its sequence.
          segment_ids_BT: 1 for a token, 0 for a hole, which nothing sees.
          fresh: the cache is empty, so that it need not be read.
        """
        tokens_BT, positions_BT, segment_ids_BT = (
            lay_out(x, TOKENS, "batch") for x in (tokens_BT, positions_BT, segment_ids_BT)
        )
        cos_BTR, sin_BTR = rotations(self.config.rope, self.config.head_dim, positions_BT)
        kv_segment_ids_BS = put_segments(cache, segment_ids_BT)
        new = NewTokens(cos_BTR, sin_BTR, segment_ids_BT, kv_segment_ids_BS, cache.filled, fresh)
        run = self._extend_stacked if isinstance(self.layers, Layer) else self._extend_each
        x_BTD, k, v = run(self._embed(tokens_BT), new, cache)
        filled = cache.filled + tokens_BT.shape[1]
        return lay_out(self.final_norm(x_BTD), ACT), KVCache(k, v, kv_segment_ids_BS, filled)

    def _extend_stacked(
        self, x_BTD: jax.Array, new: NewTokens, cache: KVCache
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        graphdef, stacked = nnx.split(self.layers)

        # All layers' cache is carried, and each layer's places set in it: as a scanned input and
        # output it would be copied whole in every call.
        def run(
            carry: tuple[jax.Array, ...], layer: tuple[jax.Array, nnx.State]
        ) -> tuple[tuple[jax.Array, ...], None]:
            x_BTD, k, v = carry
            number, params = layer
            kv = LayerCache(k, v, number)
            x_BTD, kv = nnx.merge(graphdef, params).extend(x_BTD, new, kv)
            return (x_BTD, kv.k, kv.v), None

        numbers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        start: tuple[Any, ...] = (x_BTD, cache.k, cache.v)
        (x_BTD, k, v), _ = jax.lax.scan(run, start, (numbers, stacked))
        return x_BTD, k, v

    def _extend_each(
        self, x_BTD: jax.Array, new: NewTokens, cache: KVCache
    ) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        caches, layers = [], cast(Iterable[Layer], self.layers)
        for layer, k, v in zip(layers, cache.k, cache.v, strict=True):
            x_BTD, kv = layer.extend(x_BTD, new, LayerCache(k, v))
            caches.append(kv)
        return x_BTD, tuple(kv.k for kv in caches), tuple(kv.v for kv in caches)

    def head_DV(self) -> jax.Array:  # noqa: N802
        """The output matrix in the compute dtype, gathered for use; the embedding's when tied.

        Raises:
          ConfigError: a reward model.
        """
        self._check_vocab_head()
        return self._gathered_head(self._stored_head(), "vocab")

    def for_loss(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`x_BTD` and the output matrix [D, V], for a loss over all tokens of a batch.

        On a small slice the tokens are few enough to be gathered instead of the matrix, which then
        is split over fsdp as well, by its columns.

        Args:
          x_BTD: of `hidden`.

        Raises:
          ConfigError: a reward model.
        """
        self._check_vocab_head()
        stored = self._stored_head()
        if self.adapter is None:  # else it is frozen, and has no gradient to wait for
            x_BTD, stored = settled_together(x_BTD, stored)
        split = self._tokens_are_less(x_BTD.shape[0] * x_BTD.shape[1])
        return x_BTD, self._gathered_head(stored, "loss_vocab" if split else "vocab")

    def _stored_head(self) -> jax.Array | Narrow:
        return (self.embedding if self.config.tie_embeddings else self.lm_head)[...]

    def _gathered_head(self, stored: jax.Array | Narrow, vocab: str) -> jax.Array:
        dtype = self.execution.compute_dtype
        if self.config.tie_embeddings:
            return at_use(cast_weight(stored, dtype), (vocab, "embed")).T
        return at_use(cast_weight(stored, dtype), ("embed", vocab))

    def _check_vocab_head(self) -> None:
        if self.config.head != "vocab":
            raise ConfigError("a reward model ('scalar') gives no logits", key="model.head")

    def _tokens_are_less(self, num_tokens: int) -> bool:
        """Whether gathering the tokens of an fsdp group costs at most about what the head costs.

        Both are [_, D] and move twice, the second time as gradients. Up to twice the head's bytes
        are taken for what it saves: a float32 gradient of the whole head on each device.
        """
        groups = axis_size("batch") * axis_size("length") // axis_size("stored_embed")
        columns = self.config.vocab_size // axis_size("vocab")
        return num_tokens // groups <= 2 * columns

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        table = self.embedding[...]
        if isinstance(table, SplitMatrix):
            return table.rows(tokens_BT, TOKENS, RESIDUAL)
        x_BTD = look_up(table, tokens_BT, self.execution.compute_dtype)
        return lay_out(x_BTD, RESIDUAL)

    def _run_layers(
        self, x_BTD: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        # One compiled body for all layers, fed slices of the stacked parameters.
        graphdef, stacked = nnx.split(self.layers)

        def run(x_BTD: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
            layer = nnx.merge(graphdef, params)
            return layer(x_BTD, cos_BTR, sin_BTR, segment_ids_BT), None

        run = rematerialized(run, self.execution)
        if self.execution.scan_layers:
            return jax.lax.scan(run, x_BTD, stacked)[0]
        for params in unstack(stacked, self.config.num_layers):
            x_BTD, _ = run(x_BTD, params)
        return x_BTD


def unstack(stacked: nnx.State, count: int) -> list[nnx.State]:
    """Each layer's parameters.

    By `split`, whose gradient is one concatenation; that of `count` slices would be `count`
    full-size arrays added up.
    """
    leaves, treedef = jax.tree.flatten(stacked)
    pieces = [jax.lax.split(leaf, (1,) * count, axis=0) for leaf in leaves]
    return [
        jax.tree.unflatten(treedef, [piece[i].squeeze(0) for piece in pieces]) for i in range(count)
    ]
