"""The rotary block of a Hugging Face `config.json`, of every age, to and from `RopeConfig`.

transformers 4 writes `rope_theta` and `rope_scaling` (whose kind is `rope_type`, once `type`),
transformers 5 one block `rope_parameters`. Files may carry both; then they have to agree.
"""

import math
from collections.abc import Mapping
from typing import Any

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.config.model import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling

_DEFAULT_THETA = 10000.0
_KINDS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    # `finetuned` is a remark of the first YaRN models.
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
         "mscale", "mscale_all_dim", "truncate", "finetuned"}
    ),
}  # fmt: skip
_REFUSED = {
    "dynamic": "its frequencies change with the sequence's length",
    "longrope": "its frequencies change with the sequence's length",
    "su": "its frequencies change with the sequence's length",
}


def rope_from_table(table: Mapping[str, Any], max_seq_len: int) -> RopeConfig:
    """The rotary embedding of a `config.json`.

    Raises:
      ConfigError: an unknown kind or key, a missing one, or two blocks that disagree.
    """
    block_key = "rope_scaling" if table.get("rope_scaling") else "rope_parameters"
    old, new = (table.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    for key, block in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(block, Mapping):
            raise ConfigError(f"expected an object, got {block!r}", key=key)
    theta = _theta(table, old, new)
    if (
        old
        and new
        and _scaling(old, max_seq_len, "rope_scaling")
        != _scaling(new, max_seq_len, "rope_parameters")
    ):
        raise ConfigError("contradicts rope_parameters", key="rope_scaling")
    return RopeConfig(theta, _scaling(old or new, max_seq_len, block_key))


def rope_to_table(rope: RopeConfig) -> dict[str, Any]:
    """All that transformers 4 and 5 and vLLM look for, in agreement."""
    block = _block(rope)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": block if rope.scaling is not None else None,
        "rope_parameters": {"rope_theta": rope.theta, **block},
    }


def _theta(table: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    places = {
        "rope_theta": table.get("rope_theta"),
        "rope_parameters.rope_theta": new.get("rope_theta"),
        "rope_scaling.rope_theta": old.get("rope_theta"),
    }
    said = {key: _number(value, key) for key, value in places.items() if value is not None}
    if len(set(said.values())) > 1:
        told = " and ".join(f"{key} {value:g}" for key, value in said.items())
        raise ConfigError(f"contradicting values: {told}", key="rope_theta")
    return next(iter(said.values()), _DEFAULT_THETA)


def _scaling(
    block: Mapping[str, Any], max_seq_len: int, key: str
) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    kind = _kind(block, key)
    known = _KINDS[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name in block:
        if name not in known:
            raise ConfigError(
                f"unknown key for {kind} scaling{nearest(name, sorted(known))}", key=f"{key}.{name}"
            )
    if block.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError("only 1 is supported", key=f"{key}.partial_rotary_factor")
    try:
        return _of_kind(kind, block, max_seq_len)
    except ConfigError as error:
        raise error.within(key, "") from None


def _kind(block: Mapping[str, Any], key: str) -> str:
    new, old = block.get("rope_type"), block.get("type")
    if new is not None and old is not None and new != old:
        raise ConfigError(f"'{new}' contradicts type '{old}'", key=f"{key}.rope_type")
    kind = new if new is not None else old
    if kind is None:
        # transformers takes a block without a kind for unscaled; a factor in it says otherwise.
        if "factor" in block:
            raise ConfigError("missing key", key=f"{key}.rope_type")
        return "default"
    if kind in _REFUSED:
        raise ConfigError(f"'{kind}' is not supported: {_REFUSED[kind]}", key=f"{key}.rope_type")
    if kind not in _KINDS:
        raise ConfigError(
            f"unknown value '{kind}'{nearest(str(kind), list(_KINDS))}", key=f"{key}.rope_type"
        )
    return kind


def _of_kind(
    kind: str, block: Mapping[str, Any], max_seq_len: int
) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    if kind == "linear":
        return LinearScaling(factor=_required(block, "factor"))
    # transformers takes the model's length for an original length that isn't said.
    original = block.get("original_max_position_embeddings") or max_seq_len
    original = round(_number(original, "original_max_position_embeddings"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=_required(block, "factor"),
            original_max_seq_len=original,
            low_freq_factor=_required(block, "low_freq_factor"),
            high_freq_factor=_required(block, "high_freq_factor"),
        )
    if kind == "yarn":
        return _yarn(block, original, max_seq_len)
    return None


def _yarn(block: Mapping[str, Any], original: int, max_seq_len: int) -> YarnScaling:
    if block.get("truncate") is False:
        raise ConfigError("only true is supported", key="truncate")
    given = block.get("factor")
    factor = max_seq_len / original if given is None else _number(given, "factor")
    attention_factor = block.get("attention_factor")
    mscale, mscale_all_dim = block.get("mscale"), block.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_max_seq_len=original,
        # Zero or null mean the default to transformers.
        beta_fast=_number(block.get("beta_fast") or 32, "beta_fast"),
        beta_slow=_number(block.get("beta_slow") or 1, "beta_slow"),
        attention_factor=(
            None if attention_factor is None else _number(attention_factor, "attention_factor")
        ),
    )


def _magnitude(factor: float, mscale: float) -> float:
    """DeepSeek's form of YaRN's temperature, with a weight on the logarithm."""
    return 1.0 if factor <= 1 else 0.1 * _number(mscale, "mscale") * math.log(factor) + 1.0


def _block(rope: RopeConfig) -> dict[str, Any]:
    match rope.scaling:
        case None:
            return {"rope_type": "default"}
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
        case YarnScaling() as scaling:
            block = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
            }
            if scaling.attention_factor is not None:
                block["attention_factor"] = scaling.attention_factor
            return block


def _required(block: Mapping[str, Any], key: str) -> float:
    if block.get(key) is None:
        raise ConfigError("missing key", key=key)
    return _number(block[key], key)


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float):
        raise ConfigError(f"expected a number, got {value!r}", key=key)
    return float(value)
