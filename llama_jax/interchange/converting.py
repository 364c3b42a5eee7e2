"""One checkpoint format to another: written beside, compared by logits, renamed into place."""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import ModelConfig
from llama_jax.interchange.adapters import AdaptedSource
from llama_jax.interchange.casting import is_exact
from llama_jax.interchange.checking import check_source
from llama_jax.interchange.conversion_options import Options, check_needed, check_target
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.hugging_face_writing import DEFAULT_SHARD_BYTES, write_hugging_face
from llama_jax.interchange.loading import Progress
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.orbax import write_orbax
from llama_jax.interchange.peft import PeftAdapter, write_peft
from llama_jax.interchange.source import InterchangeError, Source, source_chat_format
from llama_jax.interchange.special_rows import StartedSource
from llama_jax.interchange.staging import staged
from llama_jax.interchange.tensors import (
    DTYPES,
    Slices,
    StoredTensor,
    canonical_shapes,
)
from llama_jax.interchange.verifying import PROMPT, Comparison, compare, prompt_ids
from llama_jax.tokenizers import Tokenizer, TokenizerError
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.chat.own_templates import own_template

_FLOAT_KINDS = frozenset({"F32", "BF16", "F16"})


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
      kinds: bytes by how they are stored in DST, such as {"BF16": 269060400}, as if unquantised.
      exact: every value is the same in DST as in SRC.
      notes: what DST can't hold, or holds otherwise; one line each.
      comparison: of the two's logits, unless it was left out.
    """

    src: str
    dst: str
    src_format: str
    dst_format: str
    tensors: int
    parameters: int
    kinds: Mapping[str, int]
    exact: bool
    seconds: float
    notes: tuple[str, ...]
    comparison: Comparison | None


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    tokenizer: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint at `src` as `dst` in the format `to`; options as in `Options`.

    Weights with an adapter are merged, and written in the dtype of most of `src` where `dtype`
    doesn't say; the format "peft" takes the adapter alone.

    Args:
      adapter: merged first, as `open_adapter` takes it.

    Raises:
      ConfigError: an option that can't be used; a `dst` that is there already.
      InterchangeError: a checkpoint at fault, or logits that differ though no value should.
      TokenizerError: a tokenizer that can't be read, or not be written in that format.
    """
    begun_s = time.perf_counter()
    options = Options(dtype, shard_size, overwrite, verify, tokenizer)
    options.check(to)
    check_target(src, Path(dst), to, options)
    source = open_source(src, adapter=adapter)
    check_format(source, to)
    check_needed(source, Path(dst))
    check_source(source)
    vocabulary = _tokenizer(source) if tokenizer and to != "peft" else None
    if isinstance(source, AdaptedSource) and to != "peft" and dtype is None:
        options = dataclasses.replace(options, dtype=main_dtype(source.base))
    with staged(Path(dst)) as new:
        written = _write(source, new, to, options, vocabulary, progress)
        stored = _stored(written, to)
        exact = _is_exact(_stored(source, to), stored)
        notes = _notes(source, written, vocabulary)
        comparison = None
        if verify:
            comparison = _verified(source, written, vocabulary, exact=exact)
        kinds: dict[str, int] = {}
        for tensor in stored.values():
            kinds[tensor.kind] = kinds.get(tensor.kind, 0) + tensor.nbytes
    return Report(
        src=str(src),
        dst=str(dst),
        src_format=source.format,
        dst_format=to,
        tensors=len(stored),
        parameters=sum(int(np.prod(t.shape)) for t in stored.values()),
        kinds=kinds,
        exact=exact,
        seconds=time.perf_counter() - begun_s,
        notes=notes,
        comparison=comparison,
    )


def check_format(source: Source, to: str) -> None:
    """Whether a format can hold what there is.

    Raises:
      ConfigError: a reward model as a format without one, an adapter of a source without one.
    """
    if source.config.head == "scalar" and to in ("meta", "gguf"):
        raise ConfigError(f"{to} has no reward models; hf and orbax have", source="--to")
    if to == "peft" and not isinstance(source, AdaptedSource):
        raise ConfigError(
            f"{source.path} has no adapter; name one as --adapter, or a run that trained one",
            source="--to",
        )
    if (
        to == "peft"
        and isinstance(source, AdaptedSource)
        and isinstance(source.base, StartedSource)
    ):
        raise ConfigError(
            f"{source.path} also changed rows of special tokens (init.special_rows), which an "
            "adapter doesn't hold; hf, orbax, meta and gguf take both",
            source="--to",
        )


def main_dtype(source: Source) -> str:
    """The name of the dtype that most of a checkpoint's bytes are in."""
    sizes = dict.fromkeys(DTYPES, 0)
    names = {dtype: name for name, dtype in DTYPES.items()}
    for tensor in source.tensors.values():
        sizes[names[tensor.dtype]] += tensor.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _write(
    source: Source,
    new: Path,
    to: str,
    options: Options,
    tokenizer: Tokenizer | None,
    progress: Progress | None,
) -> Source:
    """Write it, and open what was written."""
    if to == "peft" and isinstance(source, AdaptedSource):
        base, head_dim = source.base, source.config.head_dim
        write_peft(source.adapter, new, str(base.path), head_dim, dtype=options.dtype)
        return AdaptedSource(base, PeftAdapter(new))
    write_source(_Reading(source, tokenizer, progress), new, to, options, tokenizer)
    return open_source(new)


def _stored(source: Source, to: str) -> Mapping[str, StoredTensor]:
    """The tensors that a format takes."""
    if to == "peft" and isinstance(source, AdaptedSource):
        return source.adapter.tensors
    return {name: source.tensors[name] for name in canonical_shapes(source.config)}


def write_source(
    source: Source, new: Path, to: str, options: Options, tokenizer: Tokenizer | None
) -> None:
    """Write `source` at `new` in the format `to`, with what of the options has to do with that.

    Raises:
      ConfigError: as `check_format`.
    """
    check_format(source, to)
    dtype = options.dtype
    if to == "hf":
        shard_bytes = options.shard_size or DEFAULT_SHARD_BYTES
        write_hugging_face(source, new, dtype=dtype, shard_bytes=shard_bytes, tokenizer=tokenizer)
    elif to == "orbax":
        write_orbax(source, new, dtype=dtype, tokenizer=tokenizer)
    elif to == "meta":
        from llama_jax.interchange.meta_writing import write_meta

        write_meta(source, new, dtype=dtype, tokenizer=tokenizer)
    else:
        from llama_jax.interchange.gguf_writing import write_gguf

        write_gguf(source, new, dtype=dtype)


def _tokenizer(source: Source) -> Tokenizer:
    try:
        return source.load_tokenizer()
    except TokenizerError as error:
        raise TokenizerError(f"{error}; --no-tokenizer converts the weights alone") from None


def _verified(
    source: Source, written: Source, tokenizer: Tokenizer | None, *, exact: bool
) -> Comparison:
    """The comparison of the two.

    Raises:
      InterchangeError: other token ids, or other logits though every value is the same.
    """
    if tokenizer is not None:
        ids, theirs = (each.encode(PROMPT) for each in (tokenizer, written.load_tokenizer()))
        if ids != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), 0)
            raise InterchangeError(
                f"the written tokenizer gives other ids for the prompt, first at token {at}; "
                "nothing was written"
            )
    config = source.config
    ids = prompt_ids(tokenizer, config.vocab_size, config.max_seq_len)
    comparison = compare(source, written, ids)
    if exact and not comparison.within_rounding:
        raise InterchangeError(
            f"the written checkpoint's logits differ by {comparison.max_difference:.3g} "
            f"(largest {comparison.largest_logit:.3g}), though every value should be the same, "
            f"and {comparison.tokens - comparison.same_top} of {comparison.tokens} most likely "
            "tokens with them; nothing was written"
        )
    return comparison


def _is_exact(tensors: Mapping[str, StoredTensor], written: Mapping[str, StoredTensor]) -> bool:
    return all(
        written[name].kind in _FLOAT_KINDS and is_exact(tensor.dtype, written[name].dtype)
        for name, tensor in tensors.items()
    )


def _notes(source: Source, written: Source, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """What differs and isn't a value: the new format may have no place for it."""
    notes = [*_adapter_note(source), *_config_notes(source.config, written.config)]
    if source.chat_template is not None and written.chat_template != source.chat_template:
        kept = "changed" if written.chat_template else "left out"
        notes.append(f"the chat template was {kept}")
    name = source.generation.chat_format
    if name is not None and written.chat_template is not None:
        notes.append(f"a chat template was written for the {name} format; it has no tools")
    elif name is not None:
        notes.append(f"the {name} chat format was left out: no chat template is written for it")
    for field in dataclasses.fields(GenerationDefaults):
        if field.name == "chat_format":
            continue
        ours, theirs = (getattr(each.generation, field.name) for each in (source, written))
        if ours != theirs and ours not in (None, frozenset()):
            notes.append(f"generation: {field.name}: {_said(ours)} became {_said(theirs)}")
    rows = source.config.vocab_size
    if tokenizer is None:
        notes.append("no tokenizer was written")
    elif tokenizer.vocab_size != rows:
        notes.append(f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {rows} rows")
    if isinstance(tokenizer, ByteTokenizer) and written.format == "hf":
        notes.append("no other program knows the byte tokenizer: transformers reads the rest")
    return tuple(notes)


def _adapter_note(source: Source) -> list[str]:
    if not isinstance(source, AdaptedSource):
        return []
    config = source.adapter.config
    kind = "DoRA" if config.dora else "LoRA"
    targets = ", ".join(config.targets)
    return [f"{kind} adapter of rank {config.rank} on {targets}: {source.adapter.path}"]


def _config_notes(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    # How a model was once initialised says nothing about what it computes.
    fields = [f.name for f in dataclasses.fields(ModelConfig) if f.name != "init_std"]
    changed = [name for name in fields if getattr(ours, name) != getattr(theirs, name)]
    return [f"{name}: {getattr(ours, name)} became {getattr(theirs, name)}" for name in changed]


def _said(value: Any) -> str:
    return str(sorted(value)) if isinstance(value, frozenset) else str(value)


class _Reading:
    """A source whose reads are counted, and whose tokenizer is loaded already."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer | None, progress: Progress | None
    ) -> None:
        self.format, self.path, self.config = source.format, source.path, source.config
        self.chat_template, self.generation = source.chat_template, source.generation
        if tokenizer is not None and self.generation.chat_format is not None:
            # Other programs know a format by its template and the ids that end its turns alone.
            chat = source_chat_format(source, tokenizer)
            ends = self.generation.stop_ids | {tokenizer.special[n] for n in chat.stop_tokens}
            self.generation = dataclasses.replace(self.generation, stop_ids=ends)
            self.chat_template = own_template(chat.name, tokenizer)
        self._source = source
        self._tokenizer, self._progress = tokenizer, progress
        self._done, self._total = 0, sum(t.nbytes for t in source.tensors.values())
        self._lock = threading.Lock()
        self.tensors = {
            name: dataclasses.replace(tensor, read=self._counted(tensor))
            for name, tensor in source.tensors.items()
        }

    def stored_name(self, name: str) -> str:
        """The source's."""
        return self._source.stored_name(name)

    def load_tokenizer(self) -> Tokenizer:
        """The one given.

        Raises:
          TokenizerError: it was left out.
        """
        if self._tokenizer is None:
            raise TokenizerError("this format can't be without a tokenizer; leave --no-tokenizer")
        return self._tokenizer

    def _counted(self, tensor: StoredTensor) -> Callable[[Slices], np.ndarray]:
        def read(slices: Slices) -> np.ndarray:
            values = tensor.read(slices)
            with self._lock:
                self._done += values.nbytes
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)
            return values

        return read
