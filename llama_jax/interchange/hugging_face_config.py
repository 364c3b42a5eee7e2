"""A Hugging Face `config.json`, of any age, to and from `ModelConfig`.

A field that would change the mathematics in a way that the model doesn't have is refused; what
only concerns training or caching (`attention_dropout`, `pretraining_tp`, ...) is passed over.
"""

from collections.abc import Mapping
from typing import Any

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.config.model import ModelConfig
from llama_jax.interchange.hugging_face_rope import rope_from_table, rope_to_table

MODEL_TYPE, ARCHITECTURE = "llama", "LlamaForCausalLM"
REWARD_ARCHITECTURE = "LlamaForSequenceClassification"
# Spelt LLaMA before the first release of transformers that had it.
_ARCHITECTURES = frozenset({ARCHITECTURE, "LLaMAForCausalLM", REWARD_ARCHITECTURE})
_SIZES = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}
# Where a field is absent, transformers' own defaults.
_DEFAULT_MAX_SEQ_LEN, _DEFAULT_NORM_EPS, _DEFAULT_INIT_STD = 2048, 1e-6, 0.02
# Fields of models that are nearly Llamas, with the values at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "no_rope_layers": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "qk_norm": (False, None),
    "use_qk_norm": (False, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "per_layer_config": (None,),
}


def from_config_json(table: Mapping[str, Any], file: str) -> ModelConfig:
    """The architecture that a `config.json` describes.

    Raises:
      ConfigError: another kind of model, a missing or wrong field, one that isn't supported.
    """
    try:
        _check_kind(table)
        _check_neutral(table)
        return _model_config(table)
    except ConfigError as error:
        # A field is told by the name that it has in the file.
        key = _SIZES.get(error.key, _OTHER_NAMES.get(error.key, error.key))
        raise ConfigError(error.message, key=key, source=file) from None


def to_config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """What transformers 4 and 5 and vLLM read; token ids are the caller's to add.

    A reward model is a sequence classifier of one label.
    """
    reward = config.head == "scalar"
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if reward else {}
    return {
        "architectures": [REWARD_ARCHITECTURE if reward else ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        **{key: getattr(config, field) for field, key in _SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "initializer_range": config.init_std,
        **labels,
        "max_position_embeddings": config.max_seq_len,
        "mlp_bias": config.mlp_bias,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        **rope_to_table(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        # The newer name and the older one.
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


_OTHER_NAMES = {
    "num_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "rope.theta": "rope_theta",
    "theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}


def _check_kind(table: Mapping[str, Any]) -> None:
    supported = (
        f"supported is model_type '{MODEL_TYPE}' with architecture {ARCHITECTURE} or "
        f"{REWARD_ARCHITECTURE}"
    )
    kind = table.get("model_type")
    architectures = table.get("architectures") or []
    if kind is None and not architectures:
        raise ConfigError(f"missing key; {supported}", key="model_type")
    if kind not in (None, MODEL_TYPE):
        raise ConfigError(f"'{kind}' is not supported; {supported}", key="model_type")
    if architectures and not _ARCHITECTURES & set(architectures):
        raise ConfigError(f"{architectures} is not supported; {supported}", key="architectures")
    if REWARD_ARCHITECTURE in architectures and (labels := _num_labels(table)) != 1:
        # transformers' default is 2.
        raise ConfigError(f"{labels} labels; a reward model has one", key="num_labels")


def _num_labels(table: Mapping[str, Any]) -> int:
    labels = table.get("id2label")
    if isinstance(labels, Mapping):
        return len(labels)
    return _whole(table, "num_labels", 2)


def _check_neutral(table: Mapping[str, Any]) -> None:
    for key, allowed in _NEUTRAL.items():
        if table.get(key) not in allowed:
            what = "an object" if isinstance(table[key], Mapping) else repr(table[key])
            usual = " or ".join(repr(value) for value in allowed if value is not None)
            only = f"only {usual} is" if usual else "it is not"
            raise ConfigError(f"{what}: {only} supported", key=key)
    layer_types = table.get("layer_types") or []
    if set(layer_types) - {"full_attention"}:
        raise ConfigError("only full_attention is supported", key="layer_types")


def _model_config(table: Mapping[str, Any]) -> ModelConfig:
    sizes = {field: _whole(table, key) for field, key in _SIZES.items()}
    max_seq_len = _whole(table, "max_position_embeddings", _DEFAULT_MAX_SEQ_LEN)
    return ModelConfig(
        **sizes,
        num_kv_heads=_whole(table, "num_key_value_heads", sizes["num_heads"]),
        head_dim=_head_dim(table, sizes),
        max_seq_len=max_seq_len,
        norm_eps=_real(table, "rms_norm_eps", _DEFAULT_NORM_EPS),
        rope=rope_from_table(table, max_seq_len),
        tie_embeddings=_flag(table, "tie_word_embeddings"),
        attention_bias=_flag(table, "attention_bias"),
        mlp_bias=_flag(table, "mlp_bias"),
        init_std=_real(table, "initializer_range", _DEFAULT_INIT_STD),
        head="scalar" if REWARD_ARCHITECTURE in (table.get("architectures") or []) else "vocab",
    )


def _head_dim(table: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    if table.get("head_dim") is not None:
        return _whole(table, "head_dim")
    width, heads = sizes["embed_dim"], sizes["num_heads"]
    if heads < 1 or width % heads:
        raise ConfigError(
            f"absent, and {heads} heads don't divide hidden_size, {width}", key="head_dim"
        )
    return width // heads


def _whole(table: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = table.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"missing key{_similar(key, table)}", key=key)
        return default
    if type(value) is not int:
        raise ConfigError(f"expected a whole number, got {value!r}", key=key)
    return value


def _similar(key: str, table: Mapping[str, Any]) -> str:
    suggestion = nearest(key, list(table))
    return suggestion if "did you mean" in suggestion else ""


def _real(table: Mapping[str, Any], key: str, default: float) -> float:
    value = table.get(key)
    if value is None:
        return default
    if type(value) not in (int, float):
        raise ConfigError(f"expected a number, got {value!r}", key=key)
    return float(value)


def _flag(table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key)
    if value is not None and type(value) is not bool:
        raise ConfigError(f"expected true or false, got {value!r}", key=key)
    return bool(value)
