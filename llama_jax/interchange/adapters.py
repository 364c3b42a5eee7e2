"""Adapters of any format in canonical form, and a checkpoint with one merged into it.

An adapter's tensors are named after the weight they stand beside: `layers.0.mlp.up_proj_lora_a`
[U, in], `..._lora_b` [out, U], `..._dora_scale` [out]; `reward_head` where it was trained with
them. U rank.
"""

import dataclasses
import functools
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import AdapterConfig
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.source import InterchangeError, Source
from llama_jax.interchange.tensors import (
    LM_HEAD,
    REWARD_HEAD,
    Slices,
    StoredTensor,
    any_nan,
    canonical_shapes,
    head_rows,
    pieces,
)
from llama_jax.models.lora import ADAPTER_ENDINGS, DORA_SCALE, LORA_A, LORA_B
from llama_jax.tokenizers import Tokenizer


class AdapterSource(Protocol):
    """An opened adapter; its tensors are read when asked for."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    @property
    def config(self) -> AdapterConfig:
        """Rank, scale, and the projections that are adapted."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """By canonical name; one that stands for no name of any model under its own."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Jinja source, where the adapter comes with one of its own."""
        ...

    @property
    def chat_format(self) -> str | None:
        """The name of the format that it was trained with, where it says so."""
        ...

    @property
    def partial(self) -> bool:
        """Whether it says that it adapts some layers only."""
        ...


class About(Protocol):
    """What a source says beside its weights, as `Source` documents it."""

    @property
    def format(self) -> str:
        """Of the files."""
        ...

    @property
    def path(self) -> Path:
        """The folder or file."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Jinja source."""
        ...

    @property
    def generation(self) -> GenerationDefaults:
        """Stop ids and sampling defaults."""
        ...

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that lies with it."""
        ...


def check_adapter(adapter: AdapterSource, config: ModelConfig) -> None:
    """Every factor there, none too many, of the right shape and without NaN.

    Raises:
      InterchangeError: naming the first tensor at fault.
    """
    model = dataclasses.replace(config, head=_head(adapter, config))
    wanted = canonical_shapes(model, adapter.config)
    names = [name for name in wanted if name.endswith(ADAPTER_ENDINGS)]
    for name, tensor in adapter.tensors.items():
        place = f"{tensor.file}: tensor {tensor.stored_name}"
        if name not in names and name != REWARD_HEAD:
            raise InterchangeError(f"{place} adapts nothing of this model{nearest(name, names)}")
        if tensor.shape != wanted[name]:
            raise InterchangeError(
                f"{place} has shape {list(tensor.shape)}; the model and a rank of "
                f"{adapter.config.rank} ask for {list(wanted[name])}"
            )
        if tensor.has_nan():
            raise InterchangeError(f"{place} holds a NaN")
    for name in names:
        weight = _weight(name)
        begun = any(f"{weight}{end}" in adapter.tensors for end in ADAPTER_ENDINGS)
        if name not in adapter.tensors and (begun or not adapter.partial):
            raise InterchangeError(f"{adapter.path}: the adapter has no {name}")


def check_goes_on(adapter: AdapterSource, wanted: AdapterConfig, config: ModelConfig) -> None:
    """That a run can train the adapter on: of the kind that it trains, on each of its layers.

    Args:
      wanted: the run's.
      config: the run's model.

    Raises:
      ConfigError: naming the run's field that is another.
      InterchangeError: as `check_adapter`, or an adapter of some layers only.
    """
    for key in ("rank", "alpha", "scaling", "dora"):
        ours, theirs = getattr(wanted, key), getattr(adapter.config, key)
        if ours != theirs:
            raise ConfigError(f"{ours!r}, but {theirs!r} in {adapter.path}", key=f"adapter.{key}")
    if set(wanted.targets) != set(adapter.config.targets):
        ours, theirs = (", ".join(sorted(c.targets)) for c in (wanted, adapter.config))
        raise ConfigError(f"{ours}, but {theirs} in {adapter.path}", key="adapter.targets")
    if REWARD_HEAD in adapter.tensors and config.head != "scalar":
        raise ConfigError(f"'vocab', but {adapter.path} is a reward model's", key="model.head")
    check_adapter(adapter, config)
    for name in canonical_shapes(config, wanted):
        if name.endswith(ADAPTER_ENDINGS) and name not in adapter.tensors:
            raise InterchangeError(f"{adapter.path}: adapts some layers only; it has no {name}")


class AdaptedSource:
    """A `Source` whose weights are a checkpoint's with an adapter merged into them, in float32.

    Nothing is computed before a tensor is read. Tokenizer and generation defaults are those of
    `about`, by default the checkpoint's; so is how to chat where the adapter doesn't say.
    """

    def __init__(self, base: Source, adapter: AdapterSource, *, about: About | None = None) -> None:
        """Merge `adapter` into `base`.

        Raises:
          InterchangeError: an adapter that doesn't fit.
        """
        check_adapter(adapter, base.config)
        self.base, self.adapter = base, adapter
        self._about: About = about or base
        self.format = about.format if about is not None else base.format
        self.path = self._about.path
        head = _head(adapter, base.config)
        self.config: ModelConfig = dataclasses.replace(base.config, head=head)
        self.tensors = {
            name: _merged(tensor, adapter, base.config.head_dim)
            for name, tensor in base.tensors.items()
            if not (name == LM_HEAD and head == "scalar")
        }
        if REWARD_HEAD in adapter.tensors:
            self.tensors[REWARD_HEAD] = adapter.tensors[REWARD_HEAD]

    @property
    def chat_template(self) -> str | None:
        """The adapter's own, or the checkpoint's."""
        if self.adapter.chat_format is not None:
            return None
        return self.adapter.chat_template or self._about.chat_template

    @property
    def generation(self) -> GenerationDefaults:
        """As for the class, in the adapter's chat format where it has one."""
        told = self._about.generation
        if self.adapter.chat_format is None and self.adapter.chat_template is None:
            return told
        return dataclasses.replace(told, chat_format=self.adapter.chat_format)

    def stored_name(self, name: str) -> str:
        """The checkpoint's; a reward head may be the adapter's."""
        own = self.adapter.tensors.get(name)
        return own.stored_name if own is not None else self.base.stored_name(name)

    def load_tokenizer(self) -> Tokenizer:
        """As for the class."""
        return self._about.load_tokenizer()


def adapted_names(names: Iterable[str]) -> set[str]:
    """The weights, by canonical name, that factors stand beside."""
    return {_weight(name) for name in names if name.endswith(ADAPTER_ENDINGS)}


def _head(adapter: AdapterSource, config: ModelConfig) -> Literal["vocab", "scalar"]:
    return "scalar" if REWARD_HEAD in adapter.tensors else config.head


def _weight(name: str) -> str:
    for end in ADAPTER_ENDINGS:
        name = name.removesuffix(end)
    return name


def _merged(tensor: StoredTensor, adapter: AdapterSource, head_dim: int) -> StoredTensor:
    """The tensor, or where it is adapted one that is merged as it is read."""
    a, b = (adapter.tensors.get(tensor.name + end) for end in (LORA_A, LORA_B))
    if a is None or b is None:
        return tensor
    # Rows of q and k are read by whole heads.
    multiple = head_dim if head_rows(tensor.name) else 1
    magnitude = adapter.tensors.get(tensor.name + DORA_SCALE)
    merging = _Merging(tensor, a, b, magnitude, adapter.config, multiple)
    float32 = np.dtype(np.float32)
    return dataclasses.replace(
        tensor,
        dtype=float32,
        kind="F32",
        read=merging.read,
        has_nan=functools.partial(any_nan, merging.read, tensor.shape, float32, multiple=multiple),
    )


class _Merging:
    """Reads `w + scale b a`, and for DoRA magnitude / |that| times it by output."""

    def __init__(
        self,
        w: StoredTensor,
        a: StoredTensor,
        b: StoredTensor,
        magnitude: StoredTensor | None,
        config: AdapterConfig,
        multiple: int,
    ) -> None:
        self._multiple = multiple
        self._w, self._a, self._b, self._magnitude = w, a, b, magnitude
        self._scale, self._rank = config.scale, slice(0, config.rank)
        self._factors: np.ndarray | None = None
        self._lock = threading.Lock()

    def read(self, part: Slices) -> np.ndarray:
        """A part in float32, contiguous."""
        whole = self._plain(part)
        if self._magnitude is None:
            return whole
        return whole * self._output_factors()[part[0], None]

    def _plain(self, part: Slices) -> np.ndarray:
        a = self._a.read((self._rank, part[1])).astype(np.float32)
        b = self._b.read((part[0], self._rank)).astype(np.float32)
        return self._w.read(part).astype(np.float32) + np.float32(self._scale) * (b @ a)

    def _output_factors(self) -> np.ndarray:
        # Norms are of whole rows whatever part is asked for: made once, they are small.
        assert self._magnitude is not None
        with self._lock:
            if self._factors is None:
                magnitude = self._magnitude.read_all().astype(np.float32)
                norms = np.empty_like(magnitude)
                for part in pieces(self._w.shape, 4, multiple=self._multiple):
                    norms[part[0]] = np.linalg.norm(self._plain(part), axis=1)
                self._factors = magnitude / norms
            return self._factors
