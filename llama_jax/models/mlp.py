"""SwiGLU feed-forward (arXiv 2002.05202). B batch, T length, D width, F MLP width."""

import math

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import ExecutionConfig, MatmulPrecision
from llama_jax.models.lora import adapted
from llama_jax.models.matmul import add_bias
from llama_jax.models.params import bias, weight
from llama_jax.sharding.rules import Dims, lay_out

UP: Dims = ("embed", "mlp")
DOWN: Dims = ("mlp", "embed")
WIDE: Dims = ("batch", "length", "mlp")
ACT: Dims = ("batch", "length", "embed")
RESIDUAL: Dims = ("batch", "residual_length", "embed")
WEIGHTS: dict[str, Dims] = {"gate_proj": UP, "up_proj": UP, "down_proj": DOWN}


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs) -> None:
        D, F = config.embed_dim, config.mlp_dim
        std, dtype = config.init_std, execution.param_dtype
        self.precision: MatmulPrecision = execution.matmul_precision
        self.gate_proj = weight(rngs, "gate_proj", UP, (D, F), std, dtype)
        self.up_proj = weight(rngs, "up_proj", UP, (D, F), std, dtype)
        std_out = std / math.sqrt(2 * config.num_layers)
        self.down_proj = weight(rngs, "down_proj", DOWN, (F, D), std_out, dtype)
        if config.mlp_bias:
            self.gate_bias = bias("gate_bias", UP[1:], (F,), dtype)
            self.up_bias = bias("up_bias", UP[1:], (F,), dtype)
            self.down_bias = bias("down_bias", ("norm",), (D,), dtype)
        self.biased = config.mlp_bias
        self.adapter: AdapterConfig | None = None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] in x's dtype; both x and the result lie as the residual stream."""
        x_BTD = lay_out(x_BTD, ACT)
        low, spec = self.precision, "BTD,DF->BTF"
        gate_BTF = adapted(self, "gate_proj", spec, x_BTD, UP, WIDE, low, "gate_proj")
        up_BTF = adapted(self, "up_proj", spec, x_BTD, UP, WIDE, low, "up_proj")
        if self.biased:
            gate_BTF = add_bias(gate_BTF, self.gate_bias[...], UP[1:])
            up_BTF = add_bias(up_BTF, self.up_bias[...], UP[1:])
        wide_BTF = checkpoint_name(jax.nn.silu(gate_BTF) * up_BTF, "swiglu")
        out_BTD = adapted(self, "down_proj", "BTF,FD->BTD", wide_BTF, DOWN, RESIDUAL, low)
        return add_bias(out_BTD, self.down_bias[...], ("norm",)) if self.biased else out_BTD
