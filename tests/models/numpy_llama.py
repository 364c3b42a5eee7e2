"""Llama's forward pass in NumPy float64, one row and one layer at a time: the oracle.

Written from the papers' formulas, with rotary pairs as complex numbers, so that it shares no
formulation with the package.
"""

import numpy as np


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def inverse_wavelengths(rope, head_dim):
    f = np.array([rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    scaling = rope.scaling
    if scaling is None:
        return f
    if scaling.kind == "linear":
        return f / scaling.factor
    if scaling.kind == "yarn":
        return yarn(f, rope)
    out = []
    for one in f:
        wavelength = 2 * np.pi / one
        if wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
            out.append(one)
        elif wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
            out.append(one / scaling.factor)
        else:
            s = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            out.append((1 - s) * one / scaling.factor + s * one)
    return np.array(out)


def yarn(f, rope):
    scaling = rope.scaling
    edges = [
        len(f) * np.log(scaling.original_max_seq_len / (2 * np.pi * beta)) / np.log(rope.theta)
        for beta in (scaling.beta_fast, scaling.beta_slow)
    ]
    low, high = max(np.floor(edges[0]), 0), min(np.ceil(edges[1]), 2 * len(f) - 1)
    out = []
    for i, one in enumerate(f):
        ramp = min(max((i - low) / (high - low), 0), 1)
        out.append(ramp * one / scaling.factor + (1 - ramp) * one)
    return np.array(out)


def magnitude(scaling):
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 1 + np.log(scaling.factor) / 10


def rotated(x_TNH, positions_T, rope):
    """Pair (i, i + H/2) as the complex number that the position turns."""
    half = x_TNH.shape[-1] // 2
    turn = np.exp(1j * np.outer(positions_T, inverse_wavelengths(rope, 2 * half)))
    turn = magnitude(rope.scaling) * turn
    z = (x_TNH[..., :half] + 1j * x_TNH[..., half:]) * turn[:, None]
    return np.concatenate([z.real, z.imag], -1)


def attention(x_TD, w, config, positions_T, segments_T):
    q, k, v = (
        np.tensordot(x_TD, w[f"{name}_proj"], 1) + w.get(f"{name}_bias", 0.0) for name in "qkv"
    )
    q, k = (rotated(x, positions_T, config.rope) for x in (q, k))
    out = np.zeros_like(q)
    places = np.arange(len(x_TD))
    seen = (segments_T[:, None] == segments_T) & (places[:, None] >= places)
    for n in range(config.num_heads):
        kv = n // config.heads_per_kv_head
        scores = np.where(seen, q[:, n] @ k[:, kv].T / np.sqrt(config.head_dim), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, n] = weights / weights.sum(-1, keepdims=True) @ v[:, kv]
    return np.tensordot(out, w["o_proj"], 2) + w.get("o_bias", 0.0)


def mlp(x_TD, w):
    gate = x_TD @ w["gate_proj"] + w.get("gate_bias", 0.0)
    up = x_TD @ w["up_proj"] + w.get("up_bias", 0.0)
    return (gate / (1 + np.exp(-gate)) * up) @ w["down_proj"] + w.get("down_bias", 0.0)


def row_logits(params, config, tokens_T, positions_T, segments_T):
    """Logits [T, V] of one row; params by dotted path, as `tiny_models.params_of` gives them."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = params["embedding"][tokens_T]
    for layer in range(config.num_layers):
        w = {
            name.removeprefix("layers."): value[layer]
            for name, value in params.items()
            if name.startswith("layers.")
        }
        heads = {k.split(".")[-1]: v for k, v in w.items() if k.startswith("attention.")}
        wide = {k.split(".")[-1]: v for k, v in w.items() if k.startswith("mlp.")}
        normal = rms_norm(x, w["attn_norm.scale"], config.norm_eps)
        x = x + attention(normal, heads, config, positions_T, segments_T)
        x = x + mlp(rms_norm(x, w["mlp_norm.scale"], config.norm_eps), wide)
    x = rms_norm(x, params["final_norm.scale"], config.norm_eps)
    return x @ (params["embedding"].T if config.tie_embeddings else params["lm_head"])


def logits(params, config, batch):
    rows = zip(batch["tokens"], batch["positions"], batch["segment_ids"], strict=True)
    return np.stack([row_logits(params, config, *row) for row in rows])
