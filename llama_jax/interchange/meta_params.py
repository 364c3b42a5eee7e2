"""Meta's `params.json`, to and from `ModelConfig`.

It says less than a config: what is missing is known of the releases. The width of the MLP comes
from a formula, the factor of scaled RoPE and the longest sequence from the release, told by its
dims. Other models carry our own keys (`ROPE_KEYS`, `MAX_SEQ_LEN`), which win where they are.
"""

import math
from collections.abc import Mapping
from typing import Any

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.config.model import Llama3Scaling, ModelConfig, RopeConfig
from llama_jax.interchange.tensors import InterchangeError

_SIZES = {"embed_dim": "dim", "num_layers": "n_layers", "num_heads": "n_heads"}
_OTHERS = {
    "num_kv_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "norm_eps": "norm_eps",
    "theta": "rope_theta",
}
# Ours, by field of `Llama3Scaling`; the first is Meta's own name in Llama 4.
ROPE_KEYS = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_seq_len": "rope_original_max_seq_len",
}
# Meta's code has an argument `max_seq_len`, which it would then be given twice.
MAX_SEQ_LEN = "max_context_len"
_FFN = ("multiple_of", "ffn_dim_multiplier")
# Known, and without meaning for the network.
_IDLE = ("max_batch_size", "model_parallel_size")
_KNOWN = (
    *_SIZES.values(), *_OTHERS.values(), *ROPE_KEYS.values(), *_FFN, *_IDLE, "use_scaled_rope",
    "max_seq_len", MAX_SEQ_LEN,
)  # fmt: skip
_DEFAULT_THETA, _DEFAULT_NORM_EPS, _DEFAULT_MULTIPLE = 10000.0, 1e-5, 256
# Width and layers of the releases whose RoPE is scaled by 32 (3.2 1B and 3B); others' is by 8.
_SCALED_BY_32 = ((2048, 16), (3072, 28))
# Multiples and multipliers of the releases, tried first.
_RELEASED_FFN = ((256, None), (256, 1.5), (4096, 1.3), (4096, 1.2), (1024, 1.3))


def config_from_params(
    params: Mapping[str, Any], file: str, *, vocab_size: int, tie_embeddings: bool
) -> ModelConfig:
    """The architecture that a `params.json` describes.

    Args:
      params: its object.
      file: for messages.
      vocab_size: rows of the embedding, for files that leave it open with -1.
      tie_embeddings: whether no tensor of the head is stored.

    Raises:
      ConfigError: a missing, wrong or unknown key.
    """
    try:
        _check_known(params)
        sizes = {field: _whole(params, key) for field, key in _SIZES.items()}
        stated = _whole(params, "vocab_size", -1)
        rows = vocab_size if stated == -1 else stated
        return ModelConfig(
            **sizes,
            head="vocab",
            vocab_size=rows,
            num_kv_heads=_whole(params, "n_kv_heads", sizes["num_heads"]),
            head_dim=_head_dim(sizes["embed_dim"], sizes["num_heads"]),
            mlp_dim=_mlp_dim(params, sizes["embed_dim"]),
            max_seq_len=_max_seq_len(params, sizes, rows),
            norm_eps=_real(params, "norm_eps", _DEFAULT_NORM_EPS),
            rope=RopeConfig(_real(params, "rope_theta", _DEFAULT_THETA), _scaling(params, sizes)),
            tie_embeddings=tie_embeddings,
            attention_bias=False,
            mlp_bias=False,
        )
    except ConfigError as error:
        key = (_SIZES | _OTHERS).get(error.key, error.key)
        raise ConfigError(error.message, key=key, source=file) from None


def params_from_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse, with our own keys only where the dims don't tell.

    A base of 10000 isn't written, as in the releases that have it: code of their time knows no
    such key.

    Raises:
      InterchangeError: naming a field that Meta's layout can't express.
    """
    _check_expressible(config)
    multiple, multiplier = ffn_params(config.embed_dim, config.mlp_dim)
    params: dict[str, Any] = {key: getattr(config, field) for field, key in _SIZES.items()}
    params |= {"vocab_size": config.vocab_size, "multiple_of": multiple}
    params |= {"norm_eps": config.norm_eps}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.num_kv_heads != config.num_heads:
        params["n_kv_heads"] = config.num_kv_heads
    if config.rope.theta != _DEFAULT_THETA:
        params["rope_theta"] = config.rope.theta
    if config.rope.scaling is not None:
        params["use_scaled_rope"] = True
    return params | _untold(config, params)


def mlp_dim(embed_dim: int, multiple_of: int, multiplier: float | None) -> int:
    """F of Meta's formula: two thirds of 4 D, times the multiplier, up to a multiple."""
    hidden = int(2 * (4 * embed_dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def ffn_params(embed_dim: int, wanted: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` for which `mlp_dim` gives `wanted`.

    Raises:
      InterchangeError: there are none.
    """
    plain = mlp_dim(embed_dim, 1, None)
    powers = [2**power for power in range(12, -1, -1)]
    candidates: list[tuple[int, float | None]] = list(_RELEASED_FFN)
    candidates += [(multiple, None) for multiple in powers]
    for multiple in (m for m in powers if wanted % m == 0):
        # The middle of the sizes that are rounded up to it; of them the shortest decimal.
        ratio = (wanted + 1 - multiple / 2) / max(plain, 1)
        candidates += [(multiple, round(ratio, digits)) for digits in range(1, 17)]
    for multiple, multiplier in candidates:
        if mlp_dim(embed_dim, multiple, multiplier) == wanted:
            return multiple, multiplier
    raise InterchangeError(
        f"model.mlp_dim: no multiple_of and ffn_dim_multiplier of Meta's layout give {wanted} for "
        f"embed_dim {embed_dim}"
    )


def _check_expressible(config: ModelConfig) -> None:
    reasons = {
        "head_dim": config.head_dim * config.num_heads != config.embed_dim
        and f"{config.head_dim}, but it is always embed_dim / num_heads",
        "attention_bias": config.attention_bias and "there are no biases",
        "mlp_bias": config.mlp_bias and "there are no biases",
        "rope.scaling": not isinstance(config.rope.scaling, Llama3Scaling | None)
        and f"'{getattr(config.rope.scaling, 'kind', '')}' scaling is unknown to it",
    }
    for field, reason in reasons.items():
        if reason:
            raise InterchangeError(f"model.{field} can't be written in Meta's layout: {reason}")


def _untold(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Our keys for what reading `params` back would get wrong."""
    read = config_from_params(
        params, "", vocab_size=config.vocab_size, tie_embeddings=config.tie_embeddings
    )
    extra: dict[str, Any] = {}
    if read.rope.scaling != config.rope.scaling:
        extra |= {key: getattr(config.rope.scaling, name) for name, key in ROPE_KEYS.items()}
    if read.max_seq_len != config.max_seq_len:
        extra[MAX_SEQ_LEN] = config.max_seq_len
    return extra


def _check_known(params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        # Absent and null are the same: what a release doesn't have.
        if key not in _KNOWN and value is not None:
            raise ConfigError(f"unknown key{nearest(key, list(_KNOWN))}", key=key)


def _head_dim(dim: int, heads: int) -> int:
    if heads < 1 or dim % heads:
        raise ConfigError(f"{heads} doesn't divide dim, {dim}", key="n_heads")
    return dim // heads


def _mlp_dim(params: Mapping[str, Any], dim: int) -> int:
    multiple = _whole(params, "multiple_of", _DEFAULT_MULTIPLE)
    if multiple < 1:
        raise ConfigError(f"{multiple} is not above 0", key="multiple_of")
    multiplier = params.get("ffn_dim_multiplier")
    if multiplier is not None:
        multiplier = _real(params, "ffn_dim_multiplier", 1.0)
    return mlp_dim(dim, multiple, multiplier)


def _scaling(params: Mapping[str, Any], sizes: Mapping[str, int]) -> Llama3Scaling | None:
    scaled = params.get("use_scaled_rope") or False
    if type(scaled) is not bool:
        raise ConfigError(f"expected true or false, got {scaled!r}", key="use_scaled_rope")
    if not scaled:
        for key in ROPE_KEYS.values():
            if params.get(key) is not None:
                raise ConfigError("given without use_scaled_rope", key=key)
        return None
    # Meta's code has 8 for all; the releases with other values are told by their dims.
    of_release = (sizes["embed_dim"], sizes["num_layers"]) in _SCALED_BY_32
    return Llama3Scaling(
        factor=_real(params, ROPE_KEYS["factor"], 32.0 if of_release else 8.0),
        original_max_seq_len=_whole(params, ROPE_KEYS["original_max_seq_len"], 8192),
        low_freq_factor=_real(params, ROPE_KEYS["low_freq_factor"], 1.0),
        high_freq_factor=_real(params, ROPE_KEYS["high_freq_factor"], 4.0),
    )


def _max_seq_len(params: Mapping[str, Any], sizes: Mapping[str, int], vocab_size: int) -> int:
    """The length that a release was made for: the first of these that fits."""
    for key in (MAX_SEQ_LEN, "max_seq_len"):
        if params.get(key) is not None:
            return _whole(params, key)
    if params.get("use_scaled_rope"):
        return 131072  # Llama 3.1 and later
    if vocab_size >= 128000:
        return 8192  # Llama 3
    if _real(params, "rope_theta", _DEFAULT_THETA) == 1e6:
        return 16384  # Code Llama
    # Llama 1; its larger models' files say 1e-5, as Llama 2's, but they have no grouped heads.
    wide = sizes["embed_dim"] in (6656, 8192) and params.get("n_kv_heads") is None
    if wide or _real(params, "norm_eps", _DEFAULT_NORM_EPS) == 1e-6:
        return 2048
    return 4096  # Llama 2


def _whole(params: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = params.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise ConfigError("missing key", key=key)
    if type(value) is not int:
        raise ConfigError(f"expected a whole number, got {value!r}", key=key)
    return value


def _real(params: Mapping[str, Any], key: str, default: float) -> float:
    value = params.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConfigError(f"expected a number, got {value!r}", key=key)
    return float(value)
