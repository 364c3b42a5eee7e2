"""Hyperparameters in GGUF metadata (`llama.*`), to and from `ModelConfig`.

GGUF keeps numbers as float32; they are read as the shortest decimal that rounds to them, so that
1e-5 comes back as such. A key that would change the network in a way it doesn't have is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)
from llama_jax.interchange.generation_defaults import GenerationDefaults

ARCHITECTURE = "llama"
_SIZES = {
    "embed_dim": "llama.embedding_length",
    "num_layers": "llama.block_count",
    "num_heads": "llama.attention.head_count",
    "mlp_dim": "llama.feed_forward_length",
    "max_seq_len": "llama.context_length",
}
_VOCAB_SIZE, _KV_HEADS = "llama.vocab_size", "llama.attention.head_count_kv"
_NORM_EPS, _THETA = "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"
# Each of them may be there; all mean a head's width.
_HEAD_DIMS = (
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.rope.dimension_count",
)
_SCALING = "llama.rope.scaling."
# What llama3 scaling was made from: ours, passed over by others, who use the divisors.
LLAMA3 = "llama_jax.rope.scaling."
# Keys that may be there, with the values at which they change nothing (None: whatever it is).
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "llama.tensor_data_layout": None,
    "llama.rope.scaling.finetuned": None,
    "llama.rope.scaling.yarn_ext_factor": (1.0,),
    "llama.rope.scaling.yarn_attn_factor": (1.0,),
    "llama.rope.scaling.yarn_log_multiplier": (0.0,),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.attention.causal": (True,),
    "llama.use_parallel_residual": (False,),
    "llama.logit_scale": (0.0, 1.0),
    "llama.embedding_scale": (0.0, 1.0),
    "llama.residual_scale": (0.0, 1.0),
    "llama.attention.scale": (0.0,),
    "llama.attention.sliding_window": (0,),
}
_KNOWN = {
    *_SIZES.values(),
    *_HEAD_DIMS,
    *(_VOCAB_SIZE, _KV_HEADS, _NORM_EPS, _THETA, "llama.rope.scale_linear"),
    *(_SCALING + key for key in ("type", "factor", "original_context_length", "attn_factor")),
    *(_SCALING + key for key in ("yarn_beta_fast", "yarn_beta_slow")),
}
_EOS, _EOT, _EOM, _BOS, _PAD = (
    f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom", "bos", "padding")
)
# Texts of tokens that end a message but not the turn: a tool's result is to follow.
_MESSAGE_ENDS = ("<|eom_id|>", "<|eom|>")
# All of them, where those three keys don't say it: ours.
_STOP_IDS = "llama_jax.stop_token_ids"
_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
TOP_K = "general.sampling.top_k"


def config_from_fields(
    fields: Mapping[str, Any],
    file: str,
    *,
    vocab_size: int,
    llama3: Llama3Scaling | None,
    tie_embeddings: bool,
    attention_bias: bool,
    mlp_bias: bool,
) -> ModelConfig:
    """The architecture that the metadata describes, with what only tensors tell.

    Args:
      fields: by key.
      file: for messages.
      vocab_size: rows of the embedding, for files that don't say.
      llama3: the scaling that the file's divisors stand for.
      tie_embeddings: whether there is no tensor of the head.
      attention_bias: whether there are biases on q, k, v or o.
      mlp_bias: whether there are biases in the MLP.

    Raises:
      ConfigError: another architecture, a missing or wrong key, one that isn't supported.
    """
    try:
        _check_known(fields)
        sizes = {field: _whole(fields, key) for field, key in _SIZES.items()}
        return ModelConfig(
            **sizes,
            head="vocab",
            vocab_size=_whole(fields, _VOCAB_SIZE, vocab_size),
            num_kv_heads=_whole(fields, _KV_HEADS, sizes["num_heads"]),
            head_dim=_head_dim(fields, sizes),
            norm_eps=_real(fields, _NORM_EPS),
            rope=RopeConfig(theta_of(fields), _scaling(fields, sizes["max_seq_len"], llama3)),
            tie_embeddings=tie_embeddings,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
        )
    except ConfigError as error:
        names = _SIZES | {"num_kv_heads": _KV_HEADS, "norm_eps": _NORM_EPS, "theta": _THETA}
        key = names.get(error.key, error.key)
        raise ConfigError(error.message, key=key, source=file) from None


def fields_from_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse: keys and values, floats still to be rounded to float32."""
    fields: dict[str, Any] = {key: getattr(config, field) for field, key in _SIZES.items()}
    fields |= {_VOCAB_SIZE: config.vocab_size, _KV_HEADS: config.num_kv_heads}
    fields |= dict.fromkeys(_HEAD_DIMS, config.head_dim)
    fields |= {_NORM_EPS: config.norm_eps, _THETA: config.rope.theta}
    match config.rope.scaling:
        case None:
            return fields
        case LinearScaling(factor=factor):
            return fields | {_SCALING + "type": "linear", _SCALING + "factor": factor}
        case YarnScaling() as scaling:
            return fields | _yarn_fields(scaling)
        case Llama3Scaling() as scaling:
            return fields | _llama3_fields(scaling)


def theta_of(fields: Mapping[str, Any]) -> float:
    """The rotary base; llama.cpp's default where the file doesn't say."""
    return _real(fields, _THETA, 10000.0)


def head_dim_of(fields: Mapping[str, Any]) -> int:
    """Rows of one head."""
    return _head_dim(fields, {field: _whole(fields, key) for field, key in _SIZES.items()})


def stated_llama3(fields: Mapping[str, Any]) -> Llama3Scaling | None:
    """What a file of ours says that its divisors were made from."""
    if LLAMA3 + "factor" not in fields:
        return None
    return Llama3Scaling(
        factor=_exact(fields, LLAMA3 + "factor"),
        original_max_seq_len=_whole(fields, LLAMA3 + "original_context_length"),
        low_freq_factor=_exact(fields, LLAMA3 + "low_freq_factor"),
        high_freq_factor=_exact(fields, LLAMA3 + "high_freq_factor"),
    )


def generation_from_fields(fields: Mapping[str, Any]) -> GenerationDefaults:
    """Stop ids (end of text, of turn and of message) and sampling defaults, where said."""
    stops = fields.get(_STOP_IDS) or [fields.get(key) for key in (_EOS, _EOT, _EOM)]
    told: dict[str, Any] = {f: _real(fields, key) for f, key in _SAMPLING.items() if key in fields}
    return GenerationDefaults(
        stop_ids=frozenset(token_id for token_id in stops if token_id is not None),
        bos_id=fields.get(_BOS),
        pad_id=fields.get(_PAD),
        top_k=fields.get(TOP_K),
        **told,
    )


def fields_from_generation(defaults: GenerationDefaults) -> dict[str, Any]:
    """Sampling defaults; the ids are told with the vocabulary."""
    values = {key: getattr(defaults, field) for field, key in _SAMPLING.items()}
    values[TOP_K] = defaults.top_k
    return {key: value for key, value in values.items() if value is not None}


def token_fields(defaults: GenerationDefaults, vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """What the defaults say of tokens and a vocabulary's fields don't say yet."""
    eos, texts = vocabulary.get(_EOS), vocabulary["tokenizer.ggml.tokens"]
    others = sorted(defaults.stop_ids - {eos})
    eom = next((token_id for token_id in others if texts[token_id] in _MESSAGE_ENDS), None)
    eot = next((token_id for token_id in others if token_id != eom), None)
    given = {_EOT: eot, _EOM: eom, _BOS: defaults.bos_id, _PAD: defaults.pad_id}
    fields: dict[str, Any] = {
        key: value for key, value in given.items() if value is not None and key not in vocabulary
    }
    if defaults.stop_ids and defaults.stop_ids != {eos, eot, eom} - {None}:
        fields[_STOP_IDS] = sorted(defaults.stop_ids)
    return fields


def _check_known(fields: Mapping[str, Any]) -> None:
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ConfigError(
            f"'{architecture}' is not supported, only '{ARCHITECTURE}'", key="general.architecture"
        )
    for key, value in fields.items():
        if not key.startswith(f"{ARCHITECTURE}.") or key in _KNOWN:
            continue
        allowed = _NEUTRAL.get(key, ())
        if allowed is not None and value not in allowed:
            raise ConfigError(f"{value!r}: this changes the network in an unsupported way", key=key)


def _head_dim(fields: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    said = {key: _whole(fields, key) for key in _HEAD_DIMS if key in fields}
    if len(set(said.values())) > 1:
        told = ", ".join(f"{key} {value}" for key, value in said.items())
        raise ConfigError(f"the width of a head has to be one: {told}", key=next(iter(said)))
    if said:
        return next(iter(said.values()))
    width, heads = sizes["embed_dim"], sizes["num_heads"]
    if heads < 1 or width % heads:
        raise ConfigError(f"absent, and {heads} heads don't divide {width}", key=_HEAD_DIMS[0])
    return width // heads


def _scaling(
    fields: Mapping[str, Any], max_seq_len: int, llama3: Llama3Scaling | None
) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    # As in llama.cpp, a factor alone is linear; `scale_linear` is the key's first name.
    factor = _real(fields, _SCALING + "factor", _real(fields, "llama.rope.scale_linear", 1.0))
    kind = fields.get(_SCALING + "type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(f"'{kind}' is not supported", key=_SCALING + "type")
    if llama3 is not None and (kind == "yarn" or factor not in (0.0, 1.0)):
        raise ConfigError(f"'{kind}' together with divisors in a tensor", key=_SCALING + "type")
    if kind == "yarn":
        return _yarn(fields, factor, max_seq_len)
    if _real(fields, _SCALING + "attn_factor", 1.0) != 1.0:
        raise ConfigError(f"only supported with yarn, not '{kind}'", key=_SCALING + "attn_factor")
    if kind == "none" or factor in (0.0, 1.0):
        return llama3
    return LinearScaling(factor=factor)


def _yarn(fields: Mapping[str, Any], factor: float, max_seq_len: int) -> YarnScaling:
    attention = fields.get(_SCALING + "attn_factor")
    if attention is not None:
        attention = _short(_real(fields, _SCALING + "attn_factor") * _temperature(factor))
    return YarnScaling(
        factor=factor,
        original_max_seq_len=_whole(fields, _SCALING + "original_context_length", max_seq_len),
        beta_fast=_real(fields, _SCALING + "yarn_beta_fast", 32.0),
        beta_slow=_real(fields, _SCALING + "yarn_beta_slow", 1.0),
        attention_factor=attention,
    )


def _yarn_fields(scaling: YarnScaling) -> dict[str, Any]:
    fields = {
        "type": "yarn",
        "factor": scaling.factor,
        "original_context_length": scaling.original_max_seq_len,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
    }
    if scaling.attention_factor is not None:
        # llama.cpp multiplies by the paper's temperature itself.
        fields["attn_factor"] = scaling.attention_factor / _temperature(scaling.factor)
    return {_SCALING + key: value for key, value in fields.items()}


def _llama3_fields(scaling: Llama3Scaling) -> dict[str, Any]:
    return {
        LLAMA3 + "factor": scaling.factor,
        LLAMA3 + "original_context_length": scaling.original_max_seq_len,
        LLAMA3 + "low_freq_factor": scaling.low_freq_factor,
        LLAMA3 + "high_freq_factor": scaling.high_freq_factor,
    }


def _temperature(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0


def _whole(fields: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = fields.get(key, default)
    if isinstance(value, list) and value and len(set(value)) == 1:
        value = value[0]
    if value is None:
        raise ConfigError("missing key", key=key)
    if isinstance(value, list):
        raise ConfigError("differs from layer to layer; not supported", key=key)
    if type(value) is not int:
        raise ConfigError(f"expected a whole number, got {value!r}", key=key)
    return value


def _real(fields: Mapping[str, Any], key: str, default: float | None = None) -> float:
    return _short(_exact(fields, key, default))


def _exact(fields: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = fields.get(key, default)
    if value is None:
        raise ConfigError("missing key", key=key)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConfigError(f"expected a number, got {value!r}", key=key)
    return float(value)


def _short(value: float) -> float:
    """The shortest decimal that rounds to the same float32."""
    return float(str(np.float32(value)))
