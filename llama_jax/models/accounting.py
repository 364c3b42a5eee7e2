"""What a model costs: parameters, FLOPs, bytes. The one place for these formulas.

V vocabulary, D width, L layers, N query heads, K key-value heads, H head dim, F MLP width,
T sequence length.
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import AdamWConfig, DType, ExecutionConfig, OptimizerConfig
from llama_jax.models.init import Path
from llama_jax.models.llama import Llama
from llama_jax.models.lora import LORA_A, LORA_B, trainable_paths


class OptimizerBytes(NamedTuple):
    """Bytes of moments over all devices, and over all their hosts."""

    device: int
    host: int


@functools.lru_cache(maxsize=64)
def param_shapes(
    config: ModelConfig, adapter: AdapterConfig | None = None
) -> dict[Path, tuple[int, ...]]:
    """Shape of each parameter by path, from the model itself without any memory."""
    model = nnx.eval_shape(lambda: Llama(config, ExecutionConfig(), adapter, rngs=nnx.Rngs(0)))
    return {
        tuple(map(str, path)): tuple(param.shape)
        for path, param in nnx.to_flat_state(nnx.state(model))
    }


def param_count(config: ModelConfig, adapter: AdapterConfig | None = None) -> int:
    """Parameters, a tied matrix once: (1 or 2) V D + D + L (2 D N H + 2 D K H + 3 D F + 2 D).

    And what biases and adapters there are; a reward model has D where others have the head's V D.
    """
    return sum(math.prod(shape) for shape in param_shapes(config, adapter).values())


def trainable_param_count(config: ModelConfig, adapter: AdapterConfig | None = None) -> int:
    """Parameters that a step changes: all, or an adapter's and a reward head's."""
    shapes = param_shapes(config, adapter)
    return sum(math.prod(shapes[path]) for path in trainable_paths(shapes))


def matmul_params(config: ModelConfig) -> int:
    """Parameters that each token is multiplied by: V D + L (2 D N H + 2 D K H + 3 D F).

    The head counts, tied or not, a reward model's as D; looking up an embedding and scaling a norm
    don't.
    """
    return config.embed_dim * _head_rows(config) + _layer_matrix_params(config)


def flops_per_token(
    config: ModelConfig, seq_len: int, adapter: AdapterConfig | None = None
) -> float:
    """Training FLOPs a token: 6 P + 6 L T N H, P the matmul parameters.

    With an adapter of A parameters 4 P + 6 A + 6 L T N H: frozen weights have no gradient. (What
    DoRA's norms take is a matter of the step, not of its tokens, and isn't counted.)

    A multiply-add is 2 FLOPs, and the backward pass twice the forward. Attention's q k^T and
    weights times v are 2 x 2 T N H a layer without the causal mask, half of that with it (each
    pair counted once), and three times that with the backward pass. Recomputation isn't counted:
    model FLOPs, not hardware FLOPs (PaLM, arXiv 2204.02311, appendix B, which counts all pairs).
    """
    attention = 6 * config.num_layers * seq_len * config.num_heads * config.head_dim
    if adapter is None:
        return float(6 * matmul_params(config) + attention)
    # A reward head is trained with the adapters.
    head = config.embed_dim if config.head == "scalar" else 0
    factors = sum(
        math.prod(shape)
        for path, shape in param_shapes(config, adapter).items()
        if path[-1].endswith((LORA_A, LORA_B))
    )
    return float(4 * matmul_params(config) + 2 * head + 6 * factors + attention)


def param_bytes(config: ModelConfig, dtype: DType) -> int:
    """Bytes of all parameters in a dtype, over all devices."""
    return param_count(config) * jnp.dtype(dtype).itemsize


def optimizer_bytes(config: ModelConfig, optimizer: OptimizerConfig) -> OptimizerBytes:
    """Bytes of an optimizer's moments, which have the shapes of the parameters, over all devices.

    AdamW keeps two, Lion one, Muon one for the layers' matrices and Adam's two for the rest, all
    float32 but AdamW's `moments`. Adafactor's rows and columns are counted as nothing: they are
    under a hundredth. AdamW may keep those of matrices and embeddings in the hosts' memory.
    """
    total, matrices = param_count(config), _layer_matrix_params(config)
    if isinstance(optimizer, AdamWConfig):
        two = 2 * jnp.dtype(optimizer.moments).itemsize
        on_hosts = _host_params(config) if optimizer.offload_moments else 0
        return OptimizerBytes(two * (total - on_hosts), two * on_hosts)
    kept = {"lion": total, "muon": 2 * total - matrices, "adafactor": 0}
    return OptimizerBytes(4 * kept[optimizer.kind], 0)


def cache_bytes(config: ModelConfig, batch_size: int, cache_len: int, dtype: DType) -> int:
    """Bytes of the key-value cache: 2 L K H for each place of each sequence."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_token * batch_size * cache_len * jnp.dtype(dtype).itemsize


def _host_params(config: ModelConfig) -> int:
    small = ("norm", "bias")
    return sum(
        math.prod(shape)
        for path, shape in param_shapes(config).items()
        if not any(name.endswith(small) for name in path)
    )


def _head_rows(config: ModelConfig) -> int:
    return config.vocab_size if config.head == "vocab" else 1


def _layer_matrix_params(config: ModelConfig) -> int:
    D, H = config.embed_dim, config.head_dim
    attention = 2 * D * H * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * D * config.mlp_dim)
