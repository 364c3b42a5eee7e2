"""Grouped-query attention (arXiv 2305.13245) with rotary positions.

B batch, T length, D width, N query heads, K key-value heads, H head dim, R = H / 2.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import ExecutionConfig, MatmulPrecision
from llama_jax.kernels.attention import attention
from llama_jax.kernels.cached import cached_attention
from llama_jax.models.cache import LayerCache, NewTokens
from llama_jax.models.lora import adapted
from llama_jax.models.matmul import add_bias
from llama_jax.models.params import bias, weight
from llama_jax.models.rope import rotate
from llama_jax.sharding.rules import Dims, kv_head_copies, lay_out

Q: Dims = ("embed", "q_heads", "head_dim")
KV: Dims = ("embed", "kv_heads", "head_dim")
O: Dims = ("q_heads", "head_dim", "embed")  # noqa: E741
Q_ACT: Dims = ("batch", "length", "q_heads", "head_dim")
KV_ACT: Dims = ("batch", "length", "kv_heads", "head_dim")
ACT: Dims = ("batch", "length", "embed")
RESIDUAL: Dims = ("batch", "residual_length", "embed")
WEIGHTS: dict[str, Dims] = {"q_proj": Q, "k_proj": KV, "v_proj": KV, "o_proj": O}


class Attention(nnx.Module):
    """q, k, v projections, rotation, attention within segments, output projection."""

    def __init__(self, config: ModelConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs) -> None:
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        std, dtype = config.init_std, execution.param_dtype
        self.precision: MatmulPrecision = execution.matmul_precision
        self.execution = execution
        self.q_proj = weight(rngs, "q_proj", Q, (D, N, H), std, dtype)
        self.k_proj = weight(rngs, "k_proj", KV, (D, K, H), std, dtype)
        self.v_proj = weight(rngs, "v_proj", KV, (D, K, H), std, dtype)
        std_out = std / math.sqrt(2 * config.num_layers)
        self.o_proj = weight(rngs, "o_proj", O, (N, H, D), std_out, dtype)
        if config.attention_bias:
            self.q_bias = bias("q_bias", Q[1:], (N, H), dtype)
            self.k_bias = bias("k_bias", KV[1:], (K, H), dtype)
            self.v_bias = bias("v_bias", KV[1:], (K, H), dtype)
            self.o_bias = bias("o_bias", ("norm",), (D,), dtype)
        self.biased = config.attention_bias
        self.adapter: AdapterConfig | None = None

    def __call__(
        self,
        x_BTD: jax.Array,
        cos_BTR: jax.Array,
        sin_BTR: jax.Array,
        segment_ids_BT: jax.Array,
    ) -> jax.Array:
        """[B, T, D] in x's dtype."""
        q_BTNH, k_BTKH, v_BTKH = self._queries_keys_values(x_BTD, cos_BTR, sin_BTR)
        return self._output(self._within(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT))

    def extend(
        self, x_BTD: jax.Array, new: NewTokens, kv: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        """The same over a cache, and the cache with the new tokens in it."""
        q_BTNH, k_BTKH, v_BTKH = self._queries_keys_values(x_BTD, new.cos, new.sin)
        kv = kv.put(k_BTKH, v_BTKH, new.first)
        if new.fresh:
            out_BTNH = self._within(q_BTNH, k_BTKH, v_BTKH, new.segment_ids)
        else:
            out_BTNH = cached_attention(
                q_BTNH,
                *kv.keys_values(),
                q_segment_ids_BT=new.segment_ids,
                kv_segment_ids_BS=new.kv_segment_ids,
                first=new.first,
            )
        return self._output(out_BTNH), kv

    def _queries_keys_values(
        self, x_BTD: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys rotated; as many key-value heads as the tensor axis needs."""
        x_BTD = lay_out(x_BTD, ACT)
        q_BTNH = adapted(self, "q_proj", "BTD,DNH->BTNH", x_BTD, Q, Q_ACT, self.precision)
        k_BTKH = adapted(self, "k_proj", "BTD,DKH->BTKH", x_BTD, KV, KV_ACT, self.precision)
        v_BTKH = adapted(self, "v_proj", "BTD,DKH->BTKH", x_BTD, KV, KV_ACT, self.precision)
        if self.biased:
            q_BTNH = add_bias(q_BTNH, self.q_bias[...], Q[1:])
            k_BTKH = add_bias(k_BTKH, self.k_bias[...], KV[1:])
            v_BTKH = add_bias(v_BTKH, self.v_bias[...], KV[1:])
        q_BTNH, k_BTKH = (rotate(x, cos_BTR, sin_BTR) for x in (q_BTNH, k_BTKH))
        # Named as attention reads them, so that a remat policy which keeps them makes none again.
        return (
            checkpoint_name(q_BTNH, "q"),
            checkpoint_name(split_heads(k_BTKH), "k"),
            checkpoint_name(split_heads(v_BTKH), "v"),
        )

    def _within(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        return attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            q_segment_ids_BT=segment_ids_BT,
            kv_segment_ids_BS=segment_ids_BT,
            backend=self.execution.attention,
            context=self.execution.context_attention,
        )

    def _output(self, out_BTNH: jax.Array) -> jax.Array:
        spec = "BTNH,NHD->BTD"
        out_BTD = adapted(self, "o_proj", spec, out_BTNH, O, RESIDUAL, self.precision, "o_proj")
        return add_bias(out_BTD, self.o_bias[...], ("norm",)) if self.biased else out_BTD


def split_heads(x_BTKH: jax.Array) -> jax.Array:
    """Key-value heads repeated, where they are fewer than the tensor axis, until it splits them."""
    copies = kv_head_copies(x_BTKH.shape[2])
    if copies == 1:
        return x_BTKH
    return lay_out(jnp.repeat(x_BTKH, copies, axis=2), KV_ACT)
