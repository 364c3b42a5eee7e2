"""Meta's layout made by hand, and its forward pass in NumPy float64: the oracles.

Written from the layout's description and the formulas of Meta's model, with rotary pairs of
neighbouring rows as complex numbers; nothing is shared with the package.
"""

import json

import numpy as np

NAMES = {
    "attention.q_proj": "attention.wq",
    "attention.k_proj": "attention.wk",
    "attention.v_proj": "attention.wv",
    "attention.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "attn_norm.scale": "attention_norm",
    "mlp_norm.scale": "ffn_norm",
}
COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")


def state_of(arrays, head_dim):
    """Arrays by Meta's names: rows j and H/2 + j of a q or k head become rows 2j and 2j + 1."""
    state = {
        "tok_embeddings.weight": arrays["embedding"],
        "norm.weight": arrays["final_norm.scale"],
    }
    if "lm_head" in arrays:
        state["output.weight"] = arrays["lm_head"]
    for name, array in arrays.items():
        if not name.startswith("layers."):
            continue
        _, layer, rest = name.split(".", 2)
        if rest in ("attention.q_proj", "attention.k_proj"):
            half, out = head_dim // 2, np.empty_like(array)
            for start in range(0, len(array), head_dim):
                for j in range(half):
                    out[start + 2 * j] = array[start + j]
                    out[start + 2 * j + 1] = array[start + half + j]
            array = out
        state[f"layers.{layer}.{NAMES[rest]}.weight"] = array
    return state


def cut(state, ranks, kv_heads, *, embedding_dim=0):
    """One state dict a rank."""
    shards = [{} for _ in range(ranks)]
    for name, array in state.items():
        if name.endswith("norm.weight"):
            parts = [array] * ranks
        elif name.endswith(COLUMNS):
            parts = np.split(array, ranks, 1)
        elif name == "tok_embeddings.weight":
            parts = np.split(array, ranks, embedding_dim)
        elif name.endswith(("wk.weight", "wv.weight")) and ranks > kv_heads:
            heads = np.split(array, kv_heads, 0)
            parts = [heads[rank * kv_heads // ranks] for rank in range(ranks)]
        else:
            parts = np.split(array, ranks, 0)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part
    return shards


def save(folder, params, shards):
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for rank, shard in enumerate(shards):
        tensors = {name: as_torch(array) for name, array in shard.items()}
        torch.save(tensors, folder / f"consolidated.{rank:02}.pth")
    return folder


def as_torch(array):
    import torch

    array = np.array(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def forward(state, params, ids, scaling=None):
    """Logits [T, V] in float64."""
    w = {name.removesuffix(".weight"): np.asarray(x, np.float64) for name, x in state.items()}
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    size = params["dim"] // heads
    turns = rotations(len(ids), size, params.get("rope_theta", 10000.0), scaling)
    h = w["tok_embeddings"][ids]

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + params["norm_eps"]) * weight

    def rotary(x):
        pairs = x.reshape(len(ids), -1, size // 2, 2)
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * turns[:, None]
        return np.stack([z.real, z.imag], -1).reshape(len(ids), -1, size)

    for i in range(params["n_layers"]):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in w.items() if f"layers.{i}." in k}
        x = norm(h, layer["attention_norm"])
        q, k = rotary(x @ layer["attention.wq"].T), rotary(x @ layer["attention.wk"].T)
        v = (x @ layer["attention.wv"].T).reshape(len(ids), kv_heads, size)
        k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(size)
        scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("nts,snh->tnh", weights, v).reshape(len(ids), -1)
        h = h + mixed @ layer["attention.wo"].T
        x = norm(h, layer["ffn_norm"])
        gate = x @ layer["feed_forward.w1"].T
        wide = gate / (1 + np.exp(-gate)) * (x @ layer["feed_forward.w3"].T)
        h = h + wide @ layer["feed_forward.w2"].T
    return norm(h, w["norm"]) @ w.get("output", w["tok_embeddings"]).T


def rotations(length, size, theta, scaling):
    out = []
    for i in range(0, size, 2):
        f = theta ** (-i / size)
        if scaling is not None:
            factor, low, high, old = scaling
            wavelength = 2 * np.pi / f
            if wavelength > old / low:
                f = f / factor
            elif wavelength >= old / high:
                s = (old / wavelength - low) / (high - low)
                f = (1 - s) * f / factor + s * f
        out.append(f)
    return np.exp(1j * np.outer(np.arange(length), out))
