"""PEFT's `adapter_config.json`, to and from `AdapterConfig`.

A field that would change what is computed in a way that adapters here don't have is refused; what
only concerns training (`lora_dropout`) is passed over.
"""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from llama_jax.config.loading import ConfigError
from llama_jax.config.post_training import PROJECTIONS, AdapterConfig, Projection

# Fields with the values at which they change nothing; any of them may be absent.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# How A and B began says nothing, but where the weights were changed with them.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_KEPT_WHOLE = frozenset({"score", "classifier"})


def from_peft_config(
    table: Mapping[str, Any], projections: Iterable[str], file: str
) -> AdapterConfig:
    """The adapter that an `adapter_config.json` describes.

    Args:
      projections: those that have tensors: what `target_modules` may only say by a pattern.

    Raises:
      ConfigError: another kind of adapter, a missing or wrong field, one that isn't supported.
    """
    try:
        _check_supported(table)
        found = set(projections)
        return AdapterConfig(
            rank=_number(table, "r", int),
            alpha=float(_number(table, "lora_alpha", int, float)),
            targets=tuple(name for name in PROJECTIONS if name in found),
            scaling="rslora" if table.get("use_rslora") else "lora",
            dora=bool(table.get("use_dora")),
        )
    except ConfigError as error:
        names = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules"}
        key = names.get(error.key, error.key)
        raise ConfigError(error.message, key=key, source=file) from None


def adapts_some_layers(table: Mapping[str, Any]) -> bool:
    """Whether layers may be left out.

    Some are named, by themselves or in a module's path (`layers.0.self_attn.q_proj`, or PEFT's
    shortened `0.self_attn.q_proj`), modules are excluded, or they are chosen by a pattern.
    """
    targets = table.get("target_modules")
    if isinstance(targets, str) or table.get("layers_to_transform") is not None:
        return True
    parts = (part for name in targets or () for part in name.split("."))
    return bool(table.get("exclude_modules")) or any(map(str.isdecimal, parts))


def to_peft_config(
    config: AdapterConfig, base: str, *, reward: bool, modules: Iterable[str] = ()
) -> dict[str, Any]:
    """What PEFT reads; `base` is the checkpoint that the adapter belongs to.

    Args:
      modules: those that are adapted, such as `model.layers.0.mlp.up_proj`, of an adapter that
        leaves layers out.
    """
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        # A whole number where it is one: PEFT declares it so.
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": 0.0,
        **_targets(config, list(modules)),
        "modules_to_save": ["score"] if reward else None,
        "use_rslora": config.scaling == "rslora",
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _targets(config: AdapterConfig, modules: list[str]) -> dict[str, Any]:
    """By projection and layer, or each module where projections are of different layers."""
    if not modules:
        return {"target_modules": list(config.targets)}
    layers: dict[str, set[int]] = {}
    for name in modules:
        number = next(part for part in name.split(".") if part.isdecimal())
        layers.setdefault(name.rpartition(".")[2], set()).add(int(number))
    first, *others = layers.values()
    if any(other != first for other in others):
        return {"target_modules": modules}
    return {"target_modules": list(config.targets), "layers_to_transform": sorted(first)}


def _check_supported(table: Mapping[str, Any]) -> None:
    kind = table.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{kind!r} is not supported, only 'LORA'", key="peft_type")
    for key, allowed in _NEUTRAL.items():
        if table.get(key) not in allowed:
            raise ConfigError(f"{table[key]!r} is not supported", key=key)
    if table.get("init_lora_weights") not in _INITS:
        raise ConfigError(
            f"{table['init_lora_weights']!r} changes the weights beside the adapter; convert it "
            "with PEFT (path_initial_model_for_weight_conversion) first",
            key="init_lora_weights",
        )
    others = sorted(set(table.get("modules_to_save") or ()) - _KEPT_WHOLE)
    if others:
        raise ConfigError(
            f"'{others[0]}' is trained whole; only 'score' may be", key="modules_to_save"
        )
    targets = table.get("target_modules")
    names = [] if isinstance(targets, str) else [name.rpartition(".")[2] for name in targets or ()]
    wrong = [name for name in names if name not in get_args(Projection)]
    if wrong:
        raise ConfigError(
            f"'{wrong[0]}' can't have an adapter here, only {', '.join(PROJECTIONS)}",
            key="target_modules",
        )


def _number(table: Mapping[str, Any], key: str, *kinds: type) -> Any:
    if type(table.get(key)) not in kinds:
        raise ConfigError(f"expected a number, got {table.get(key)!r}", key=key)
    return table[key]
