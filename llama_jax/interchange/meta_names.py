"""Meta's names of a Llama's tensors, to and from the canonical ones, and how shards join.

Column-parallel matrices are cut by rows, row-parallel ones by columns, as in llama-models'
`checkpoint.py`; norms are copied to every rank.
"""

import re

from llama_jax.interchange.tensors import EMBEDDING, FINAL_NORM, LM_HEAD

# A buffer that some releases stored; params.json says all of it.
ROPE_FREQS = "rope.freqs"

_ONCE = {
    EMBEDDING: "tok_embeddings.weight",
    FINAL_NORM: "norm.weight",
    LM_HEAD: "output.weight",
}
_LAYER = {
    "attn_norm.scale": "attention_norm.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    **{f"attention.{x}_proj": f"attention.w{x}.weight" for x in "qkvo"},
    "mlp.gate_proj": "feed_forward.w1.weight",
    "mlp.down_proj": "feed_forward.w2.weight",
    "mlp.up_proj": "feed_forward.w3.weight",
}
_ONCE_BACK = {stored: name for name, stored in _ONCE.items()}
_LAYER_BACK = {stored: name for name, stored in _LAYER.items()}
_CUT_BY_COLUMNS = ("o_proj", "down_proj")


def to_meta(name: str) -> str:
    """`layers.0.attention.wq.weight` for `layers.0.attention.q_proj`."""
    if name in _ONCE:
        return _ONCE[name]
    _, layer, rest = name.split(".", 2)
    # Meta's layout has no biases; the nearest name, for messages.
    return f"layers.{layer}.{_LAYER.get(rest, rest)}"


def from_meta(stored: str) -> str | None:
    """The canonical name, or None where no Llama has such a tensor."""
    if stored in _ONCE_BACK:
        return _ONCE_BACK[stored]
    found = re.fullmatch(r"layers\.(0|[1-9]\d*)\.(.+)", stored)
    if found is None or found[2] not in _LAYER_BACK:
        return None
    return f"layers.{found[1]}.{_LAYER_BACK[found[2]]}"


def shard_dim(name: str) -> int | None:
    """The dim along which ranks cut a tensor, or None of one that each has whole.

    The embedding's is 0 from Llama 3 on and was 1 before; that is for the caller to tell.
    """
    if name.endswith("_norm.scale"):
        return None
    return 1 if name.endswith(_CUT_BY_COLUMNS) else 0
