"""Hugging Face folders written by hand, with weights whose logits transformers has given.

Shares no code with the package's own writer: NumPy, JSON and the format's description.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

# The parity tests' weights and stored logits are of use here too.
sys.path.append(str(Path(__file__).parents[1] / "models"))

import reference_weights
from tiny_models import F32, logits, make, params_of

CASES, STORED = reference_weights.CASES, reference_weights.STORED
__all__ = ["CASES", "F32", "STORED", "logits", "make", "params_of"]


def their_tensors(config):
    """float32 [out, in] by transformers' names."""
    return {n: np.ascontiguousarray(x) for n, x in reference_weights._their_names(config).items()}


def reference_batch(config):
    tokens_BT = reference_weights.tokens(config)
    places_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    return {"tokens": tokens_BT, "positions": places_BT, "segment_ids": np.ones_like(tokens_BT)}


def write_by_hand(path, tensors, *, metadata=True):
    """A safetensors file; an array of uint16 stands for bfloat16 bits."""
    kinds = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64"}
    header = {"__metadata__": {"format": "pt"}} if metadata else {}
    end = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": kinds[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header).encode()
    # The first tensor begins at a multiple of 64 bytes, where JAX might use the file's own memory.
    text += b" " * (-(8 + len(text)) % 64)
    values = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def rope_block(rope, kind_key="rope_type"):
    scaling = rope.scaling
    if scaling is None:
        return None
    block = {kind_key: scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        block["original_max_position_embeddings"] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        block |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        block |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            block["attention_factor"] = scaling.attention_factor
    return block


def config_table(config, style="old"):
    """`config.json` as transformers 4 ("old") or 5 ("new") wrote it, or before `rope_type`."""
    table = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pretraining_tp": 1,
        "torch_dtype": "float32",
    }
    if style == "new":
        block = rope_block(config.rope) or {"rope_type": "default"}
        return table | {"rope_parameters": block | {"rope_theta": config.rope.theta}}
    key = "rope_type" if style == "old" else "type"
    return table | {
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_block(config.rope, key),
    }


def write_folder(folder, config, *, style="old", tensors=None, changes=None):
    """A folder with one file; `changes` are made to its config."""
    folder.mkdir(parents=True, exist_ok=True)
    table = config_table(config, style) | (changes or {})
    (folder / "config.json").write_text(json.dumps(table))
    write_by_hand(folder / "model.safetensors", tensors or their_tensors(config))
    return folder


def write_sharded(folder, config, *, places=None):
    """The same in two files with an index; `places` overrides its weight_map."""
    write_folder(folder, config)
    (folder / "model.safetensors").unlink()
    tensors = their_tensors(config)
    names = list(tensors)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, half in zip(files, halves, strict=True):
        write_by_hand(folder / file, {name: tensors[name] for name in half})
    said = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = {"metadata": {}, "weight_map": places(said) if places else said}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
