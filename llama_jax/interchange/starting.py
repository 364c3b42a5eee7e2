"""The parameters that a run starts from: a checkpoint's, and fresh ones for what the run adds."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from flax import nnx
from jax.sharding import Mesh

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import ExecutionConfig
from llama_jax.interchange.adapters import AdapterSource, check_goes_on
from llama_jax.interchange.checking import check_structure
from llama_jax.interchange.loading import (
    Progress,
    check_values_together,
    load_params,
    load_tensors,
)
from llama_jax.interchange.source import Source
from llama_jax.interchange.special_rows import find_untrained_rows, started_at_mean
from llama_jax.interchange.tensors import REWARD_HEAD, StoredTensor
from llama_jax.models.accounting import param_shapes, trainable_param_count
from llama_jax.models.init import abstract_model, init_added
from llama_jax.models.llama import Llama
from llama_jax.models.lora import ADAPTER_ENDINGS
from llama_jax.tokenizers import Tokenizer

# How a model was once initialised says nothing about what it computes.
_OF_NO_ACCOUNT = frozenset({"init_std", "head", "max_seq_len"})
# A format may keep an epsilon or a frequency in float32.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Start:
    """A model to train.

    Attributes:
      model: with the checkpoint's weights and, fresh, what the run adds to them.
      notes: what there is to say about it, one line each.
    """

    model: Llama
    notes: tuple[str, ...]


def load_params_into(
    source: Source,
    config: ModelConfig,
    execution: ExecutionConfig,
    mesh: Mesh,
    *,
    adapter: AdapterConfig | None = None,
    trained: AdapterSource | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    special_rows: Literal["keep", "mean"] = "keep",
    progress: Progress | None = None,
) -> Start:
    """A run's model with the weights of a checkpoint.

    A reward model (`config.head`) may start from a model with a vocabulary's head, which is left
    out. A checkpoint that is merged with an adapter is one like any other: fresh adapters stand
    beside the merged weights.

    Args:
      source: opened; its architecture must be `config`'s but for `max_seq_len`.
      trained: an adapter of the kind of `adapter` to go on with, in place of a fresh one.
      seed: of adapters, of a reward head, and of what `special_rows` adds.
      tokenizer: the run's, for finding special rows that were never trained; None doesn't look.
      special_rows: what becomes of these; "mean" starts them at the mean of the others.

    Raises:
      ConfigError: another architecture or adapter, naming the field; a mesh that doesn't divide a
        parameter.
      InterchangeError: a tensor at fault, before any device memory is taken.
    """
    notes = list(_check_architecture(source, config))
    factors: Mapping[str, StoredTensor] = {}
    if adapter is not None and trained is not None:
        check_goes_on(trained, adapter, config)
        factors = trained.tensors
        notes.append(f"going on with the adapter of {trained.path}")
    check_structure(source)
    instead = _special_rows(source, config, tokenizer, special_rows, seed, notes)
    graphdef, abstract = abstract_model(config, execution, mesh, adapter)
    stored = param_shapes(source.config)
    kept, added = nnx.split_state(abstract, lambda path, _: tuple(map(str, path)) in stored, ...)
    check_values_together(source)
    if REWARD_HEAD in factors:
        instead[REWARD_HEAD] = factors[REWARD_HEAD]
    weights = load_params(source, kept, mesh, instead=instead, progress=progress)
    given, added = nnx.split_state(added, lambda path, _: _is_given(path, factors), ...)
    learned = load_tensors(factors, given, mesh)
    fresh = init_added(added, weights, config, execution, mesh, seed, adapter)
    if adapter is not None:
        kind = "DoRA" if adapter.dora else "LoRA"
        count = trainable_param_count(config, adapter)
        notes.append(f"{kind} adapters of rank {adapter.rank}: {count / 1e6:.2f}M parameters train")
    return Start(nnx.merge(graphdef, weights, learned, fresh), tuple(notes))


def _is_given(path: tuple[Any, ...], factors: Mapping[str, StoredTensor]) -> bool:
    """Whether a parameter beside the checkpoint's is one of a trained adapter."""
    if path[-1].endswith(ADAPTER_ENDINGS):
        return bool(factors)
    return ".".join(map(str, path)) in factors


def _check_architecture(source: Source, config: ModelConfig) -> Iterator[str]:
    """Notes on what differs and may."""
    theirs = source.config
    skipped = {*_OF_NO_ACCOUNT, *(("tie_embeddings",) if config.head == "scalar" else ())}
    for key, wanted, found in _differences(config, theirs):
        if key not in skipped:
            raise ConfigError(f"{wanted}, but {found} in {source.path}", key=f"model.{key}")
    if config.max_seq_len > theirs.max_seq_len:
        yield (
            f"model.max_seq_len {config.max_seq_len} is over the {theirs.max_seq_len} of "
            f"{source.path}: longer rows are new to it"
        )
    if config.head == theirs.head:
        return
    if theirs.head == "scalar":
        raise ConfigError(f"'vocab', but {source.path} is a reward model", key="model.head")
    yield (
        f"the reward head is new, drawn from the run's seed; {source.path} has a vocabulary's, "
        "which is left out"
    )


def _differences(ours: Any, theirs: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Fields that differ, by dotted path, with both values."""
    if type(ours) is not type(theirs):
        yield prefix.removesuffix("."), _shown(ours), _shown(theirs)
        return
    for field in dataclasses.fields(ours):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        key = prefix + field.name
        if dataclasses.is_dataclass(one) or dataclasses.is_dataclass(other):
            yield from _differences(one, other, f"{key}.")
        elif one != other and not _rounded(one, other):
            yield key, one, other


def _rounded(one: Any, other: Any) -> bool:
    both = isinstance(one, float) and isinstance(other, float)
    return both and math.isclose(one, other, rel_tol=_ROUNDING)


def _shown(value: Any) -> str:
    return "none" if value is None else f"'{value.kind}'"


def _special_rows(
    source: Source,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    wish: Literal["keep", "mean"],
    seed: int,
    notes: list[str],
) -> dict[str, StoredTensor]:
    """Tensors to load instead of the source's, for `load_params`; tells what was found."""
    if tokenizer is None:
        if wish == "mean":
            raise ConfigError("needs a tokenizer, which names them", key="init.special_rows")
        return {}
    found = [
        rows
        for rows in find_untrained_rows(source, tokenizer)
        if (rows.tensor,) in param_shapes(config)
    ]
    what = (
        "started at the mean of the others"
        if wish == "mean"
        else "kept; init.special_rows = 'mean' starts them at the mean of the others"
    )
    notes.extend(f"{rows}: {what}" for rows in found)
    return started_at_mean(source, found, tokenizer, seed) if wish == "mean" else {}
