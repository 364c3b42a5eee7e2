"""The options of a conversion, and what may become of the place that it writes to."""

import dataclasses
import os
import re
from pathlib import Path

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.interchange.adapters import AdaptedSource
from llama_jax.interchange.opening import HUB, recognise
from llama_jax.interchange.source import Source
from llama_jax.interchange.tensors import DTYPES

FORMATS = ("hf", "meta", "gguf", "orbax", "peft")
GGUF_DTYPES = (*DTYPES, "q8_0")
_UNITS = {
    "": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
      dtype: of the written values, one of `GGUF_DTYPES` for GGUF, of `DTYPES` else; None keeps
        each tensor's own.
      shard_size: most bytes of a safetensors file, for Hugging Face alone; None is 5 GB.
      overwrite: replace a checkpoint that stands there.
      verify: compare the logits of both.
      tokenizer: write the tokenizer too.
    """

    dtype: str | None = None
    shard_size: int | None = None
    overwrite: bool = False
    verify: bool = True
    tokenizer: bool = True

    def check(self, to: str) -> None:
        """Raise `ConfigError` for an option that the format has no use for."""
        if to not in FORMATS:
            raise ConfigError(f"unknown format '{to}'{nearest(to, FORMATS)}", source="--to")
        known = GGUF_DTYPES if to == "gguf" else tuple(DTYPES)
        if self.dtype is not None and self.dtype not in known:
            raise ConfigError(
                f"'{self.dtype}' can't be written as {to}; one of {', '.join(known)}",
                source="--dtype",
            )
        if self.shard_size is not None and to != "hf":
            raise ConfigError(f"{to} files are not sharded", source="--shard-size")
        if not self.tokenizer and to == "gguf":
            raise ConfigError("a GGUF file is of no use without one", source="--no-tokenizer")
        if not self.tokenizer and to == "peft":
            raise ConfigError("an adapter has none", source="--no-tokenizer")


def check_target(src: str | Path, dst: Path, to: str, options: Options) -> None:
    """What is at `dst` may only be replaced where that was asked for and loses no other work.

    Raises:
      ConfigError: it is there and may not be replaced, or isn't named as the format asks.
    """
    if to == "gguf" and dst.suffix != ".gguf":
        raise ConfigError("a GGUF file's name ends in .gguf", source=str(dst))
    if to != "gguf" and dst.suffix == ".gguf":
        raise ConfigError(f"would be a folder of {to} files named as a GGUF file", source=str(dst))
    if not os.path.lexists(dst):
        return
    if not options.overwrite:
        raise ConfigError("is there already; --overwrite replaces it", source=str(dst))
    if not str(src).startswith(HUB) and _within(Path(src), dst):
        raise ConfigError("holds SRC, it can't be replaced by it", source=str(dst))
    empty = dst.is_dir() and not any(dst.iterdir())
    if not empty and recognise(dst) in (None, "run"):
        what = "a training run" if recognise(dst) == "run" else "no checkpoint"
        raise ConfigError(f"is {what}; --overwrite doesn't replace that", source=str(dst))


def check_needed(source: Source, dst: Path) -> None:
    """That `dst` isn't what an adapter stands beside, or the adapter.

    Raises:
      ConfigError: it is.
    """
    while isinstance(source, AdaptedSource):
        for path in (source.adapter.path, source.base.path):
            if os.path.lexists(dst) and _within(path, dst):
                raise ConfigError(
                    f"holds {path}, which SRC is merged from; it can't be replaced by it",
                    source=str(dst),
                )
        source = source.base


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number.

    Raises:
      ConfigError: not of that form, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    size = (
        int(float(found[1]) * units[found[2].lower()]) if found and found[2].lower() in units else 0
    )
    if size < 1:
        raise ConfigError(f"'{text}' is not a size such as 5GB or 500MB", source="--shard-size")
    return size


def _within(path: Path, folder: Path) -> bool:
    path, folder = path.resolve(), folder.resolve()
    return path == folder or folder in path.parents
