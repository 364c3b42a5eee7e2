"""Hugging Face's names of a Llama's tensors, to and from the canonical ones."""

import re

from llama_jax.interchange.tensors import EMBEDDING, FINAL_NORM, LM_HEAD, REWARD_HEAD

_ONCE = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    LM_HEAD: "lm_head.weight",
    REWARD_HEAD: "score.weight",
}
_LAYER = {
    "attn_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    **{f"attention.{x}_proj": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attention.{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    **{f"mlp.{x}_proj": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"mlp.{x}_bias": f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
}
_ONCE_BACK = {stored: name for name, stored in _ONCE.items()}
_LAYER_BACK = {stored: name for name, stored in _LAYER.items()}
# Tables of rotary frequencies that transformers stored until early 2023; the config says them.
_ROTARY_TABLE = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")


def to_hugging_face(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` for `layers.0.attention.q_proj`."""
    if name in _ONCE:
        return _ONCE[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_LAYER[rest]}"


def from_hugging_face(stored: str) -> str | None:
    """The canonical name, or None where no Llama has such a tensor."""
    if stored in _ONCE_BACK:
        return _ONCE_BACK[stored]
    found = re.fullmatch(r"model\.layers\.(0|[1-9]\d*)\.(.+)", stored)
    if found is None or found[2] not in _LAYER_BACK:
        return None
    return f"layers.{found[1]}.{_LAYER_BACK[found[2]]}"


def is_rotary_table(stored: str) -> bool:
    """Whether this is a table of frequencies, which old files hold though the config says them."""
    return _ROTARY_TABLE.fullmatch(stored) is not None
