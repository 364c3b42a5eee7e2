"""Weights, batches and configs of the parity tests with transformers, from NumPy alone.

`RandomState` is frozen by NumPy's promise, so stored logits stay those of these weights.
Run as a script (torch and transformers installed) to write `reference_logits.npz` anew.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import CONFIG

from llama_jax.config.model import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)
from llama_jax.models.accounting import param_shapes

STORED = Path(__file__).parent / "reference_logits.npz"
# One long enough for every band of llama3 scaling to turn; explicit head_dim in both grouped ones.
CASES = {
    "grouped_llama3": dataclasses.replace(CONFIG, init_std=0.02),
    "grouped_llama3_tied": dataclasses.replace(CONFIG, tie_embeddings=True, init_std=0.02),
    "multi_head_plain": dataclasses.replace(
        CONFIG, num_kv_heads=8, head_dim=4, rope=RopeConfig(10000.0), norm_eps=1e-6
    ),
    "biased_yarn": dataclasses.replace(
        CONFIG,
        attention_bias=True,
        mlp_bias=True,
        rope=RopeConfig(10000.0, YarnScaling(factor=4.0, original_max_seq_len=64, beta_fast=8.0)),
    ),
    "linear": dataclasses.replace(CONFIG, rope=RopeConfig(10000.0, LinearScaling(factor=2.0))),
}
LENGTH = 24


def weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """float32 arrays by dotted path, in the package's shapes."""
    random = np.random.RandomState(0)
    shapes = {".".join(path): shape for path, shape in param_shapes(config).items()}
    values = {}
    for name in sorted(shapes):
        spread = 0.3 if "norm" in name else 0.15
        value = spread * random.standard_normal(shapes[name]) + ("norm" in name)
        values[name] = value.astype(np.float32)
    return values


def tokens(config: ModelConfig) -> np.ndarray:
    return np.random.RandomState(1).randint(0, config.vocab_size, (2, LENGTH)).astype(np.int32)


def transformers_model(config: ModelConfig) -> Any:
    """transformers' Llama with the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.mlp_dim,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters=_their_rope(config.rope),
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    ).float()
    state = {name: torch.from_numpy(x.copy()) for name, x in _their_names(config).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    return theirs.eval()


def _their_rope(rope: RopeConfig) -> dict[str, Any]:
    theirs: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    match rope.scaling:
        case LinearScaling(factor=factor):
            theirs |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            theirs |= {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
        case YarnScaling() as scaling:
            theirs |= {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
    return theirs


def _their_names(config: ModelConfig) -> dict[str, np.ndarray]:
    """[out, in] matrices by their names."""
    ours = weights(config)
    theirs = {
        "model.embed_tokens.weight": ours["embedding"],
        "model.norm.weight": ours["final_norm.scale"],
    }
    if not config.tie_embeddings:
        theirs["lm_head.weight"] = ours["lm_head"].T
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        theirs[layer + "input_layernorm.weight"] = ours["layers.attn_norm.scale"][i]
        theirs[layer + "post_attention_layernorm.weight"] = ours["layers.mlp_norm.scale"][i]
        for name in ("q_proj", "k_proj", "v_proj"):
            w_DX = ours[f"layers.attention.{name}"][i].reshape(config.embed_dim, -1)
            theirs[f"{layer}self_attn.{name}.weight"] = w_DX.T
        o_XD = ours["layers.attention.o_proj"][i].reshape(-1, config.embed_dim)
        theirs[f"{layer}self_attn.o_proj.weight"] = o_XD.T
        for name in ("gate_proj", "up_proj", "down_proj"):
            theirs[f"{layer}mlp.{name}.weight"] = ours[f"layers.mlp.{name}"][i].T
        for name in (name for name in ours if name.endswith("_bias")):
            _, part, short = name.split(".")
            module = {"attention": "self_attn", "mlp": "mlp"}[part]
            their_name = f"{layer}{module}.{short.replace('_bias', '_proj')}.bias"
            theirs[their_name] = ours[name][i].reshape(-1)
    return theirs


def transformers_logits(config: ModelConfig) -> np.ndarray:
    import torch

    with torch.no_grad():
        return transformers_model(config)(torch.from_numpy(tokens(config)).long()).logits.numpy()


if __name__ == "__main__":
    np.savez_compressed(STORED, **{name: transformers_logits(CASES[name]) for name in CASES})
    sys.stdout.write(f"{STORED}: {STORED.stat().st_size} bytes\n")
