"""GGUF's names of a Llama's tensors (architecture `llama`), to and from the canonical ones."""

import re

from llama_jax.interchange.tensors import EMBEDDING, FINAL_NORM, LM_HEAD

# The divisors of llama3 scaling: a table that belongs to the config, not to the parameters.
ROPE_FREQS = "rope_freqs.weight"

_ONCE = {
    EMBEDDING: "token_embd.weight",
    FINAL_NORM: "output_norm.weight",
    LM_HEAD: "output.weight",
}
_ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
_MLP = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
_LAYER = {
    "attn_norm.scale": "attn_norm.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    **{f"attention.{x}_proj": f"{stored}.weight" for x, stored in _ATTENTION.items()},
    **{f"attention.{x}_bias": f"{stored}.bias" for x, stored in _ATTENTION.items()},
    **{f"mlp.{x}_proj": f"{stored}.weight" for x, stored in _MLP.items()},
    **{f"mlp.{x}_bias": f"{stored}.bias" for x, stored in _MLP.items()},
}
_ONCE_BACK = {stored: name for name, stored in _ONCE.items()}
_LAYER_BACK = {stored: name for name, stored in _LAYER.items()}


def to_gguf_name(name: str) -> str:
    """`blk.0.attn_q.weight` for `layers.0.attention.q_proj`."""
    if name in _ONCE:
        return _ONCE[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_LAYER[rest]}"


def from_gguf_name(stored: str) -> str | None:
    """The canonical name, or None where no Llama has such a tensor."""
    if stored in _ONCE_BACK:
        return _ONCE_BACK[stored]
    found = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(.+)", stored)
    if found is None or found[2] not in _LAYER_BACK:
        return None
    return f"layers.{found[1]}.{_LAYER_BACK[found[2]]}"
