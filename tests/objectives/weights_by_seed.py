"""Weights of small models from NumPy alone, here and in transformers. No tests here.

`RandomState` is frozen by NumPy's promise, so stored figures stay those of these weights.
"""

from typing import Any

import numpy as np
from response_batches import MODEL

from llama_jax.config.model import ModelConfig
from llama_jax.models.accounting import param_shapes

END = 2


def weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """float32 arrays by dotted path, in the package's shapes."""
    random = np.random.RandomState(seed)
    shapes = {".".join(path): shape for path, shape in param_shapes(config).items()}
    values = {}
    for name in sorted(shapes):
        # Sharp enough for log-probabilities to differ, as rounding grows with them.
        spread = 0.3 if "norm" in name else 0.4
        value = spread * random.standard_normal(shapes[name]) + ("norm" in name)
        values[name] = value.astype(np.float32)
    return values


def transformers_model(seed: int, config: ModelConfig = MODEL) -> Any:
    """transformers' Llama with the weights of a seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    scalar = config.head == "scalar"
    kind = LlamaForSequenceClassification if scalar else LlamaForCausalLM
    theirs = kind(
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
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            attn_implementation="eager",
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=END,
            num_labels=1,
        )
    ).float()
    names = _their_names(config, seed)
    theirs.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in names.items()})
    return theirs.eval()


def _their_names(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """[out, in] matrices by transformers' names."""
    ours, D = weights(config, seed), config.embed_dim
    theirs = {
        "model.embed_tokens.weight": ours["embedding"],
        "model.norm.weight": ours["final_norm.scale"],
    }
    if config.head == "scalar":
        theirs["score.weight"] = ours["reward_head"][None]
    else:
        theirs["lm_head.weight"] = ours["lm_head"].T
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        theirs[layer + "input_layernorm.weight"] = ours["layers.attn_norm.scale"][i]
        theirs[layer + "post_attention_layernorm.weight"] = ours["layers.mlp_norm.scale"][i]
        for name in ("q_proj", "k_proj", "v_proj"):
            w_DX = ours[f"layers.attention.{name}"][i].reshape(D, -1)
            theirs[f"{layer}self_attn.{name}.weight"] = w_DX.T
        o_XD = ours["layers.attention.o_proj"][i].reshape(-1, D)
        theirs[f"{layer}self_attn.o_proj.weight"] = o_XD.T
        for name in ("gate_proj", "up_proj", "down_proj"):
            theirs[f"{layer}mlp.{name}.weight"] = ours[f"layers.mlp.{name}"][i].T
    return theirs
