"""What defines a Llama's mathematics: every field changes a parameter's shape or an output.

How the network is executed (dtypes, remat, attention backend, mesh) is `config.run`'s.
"""

import dataclasses
from typing import Annotated, Literal

from llama_jax.config.loading import ConfigError, Positive, Range, check_ranges


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: Annotated[float, Positive] = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Scaling by frequency of Llama 3.1 and later (llama-models, `models/llama3/model.py`)."""

    factor: Annotated[float, Positive]
    original_max_seq_len: Annotated[int, Positive]
    kind: Literal["llama3"] = "llama3"
    low_freq_factor: Annotated[float, Positive] = 1.0
    high_freq_factor: Annotated[float, Positive] = 4.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.high_freq_factor < self.low_freq_factor:
            raise ConfigError(
                f"{self.high_freq_factor} is below low_freq_factor, {self.low_freq_factor}",
                key="high_freq_factor",
            )


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): scaling by frequency, and sharper attention."""

    factor: Annotated[float, Positive]
    original_max_seq_len: Annotated[int, Positive]
    kind: Literal["yarn"] = "yarn"
    # Pairs that turn more often than `beta_fast` over the original length are kept, those that
    # turn less than `beta_slow` are divided by the factor.
    beta_fast: Annotated[float, Positive] = 32.0
    beta_slow: Annotated[float, Positive] = 1.0
    # Multiplies cosines and sines; None is the paper's 0.1 ln(factor) + 1.
    attention_factor: Annotated[float, Positive] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.beta_fast < self.beta_slow:
            raise ConfigError(
                f"{self.beta_fast} is below beta_slow, {self.beta_slow}", key="beta_fast"
            )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base `theta` and optional scaling."""

    theta: Annotated[float, Positive]
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a dense Llama. Letters as in the design's table of dims."""

    vocab_size: Annotated[int, Positive]  # V
    embed_dim: Annotated[int, Positive]  # D
    num_layers: Annotated[int, Positive]  # L
    num_heads: Annotated[int, Positive]  # N
    num_kv_heads: Annotated[int, Positive]  # K
    head_dim: Annotated[int, Positive]  # H
    mlp_dim: Annotated[int, Positive]  # F
    max_seq_len: Annotated[int, Positive]  # the longest sequence that the model accepts
    norm_eps: Annotated[float, Positive]
    rope: RopeConfig
    tie_embeddings: bool  # without meaning where the head is no matrix
    # No released Llama has biases; models of its architecture by others may.
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False  # on gate, up and down
    # A token's logits over the vocabulary, or one number: a reward model.
    head: Literal["vocab", "scalar"] = "vocab"
    # Standard deviation of the normal initialiser; the output projections of attention and MLP
    # are scaled down by sqrt(2 * num_layers), as in GPT-2 and Megatron.
    init_std: Annotated[float, Range(above=0.0, at_most=1.0)] = 0.02

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_kv_heads} does not divide num_heads, {self.num_heads}",
                key="num_kv_heads",
            )
        if self.head_dim % 2:
            raise ConfigError(f"{self.head_dim} is odd; rotary pairs need it even", key="head_dim")

    @property
    def heads_per_kv_head(self) -> int:
        """G, query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads
