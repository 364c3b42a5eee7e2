"""A run's documents and tokenizer, opened; what isn't there yet is made, in the run directory.

<run_dir>/tokenizer/            when the tokenizer is trained on the run's own text
<run_dir>/data/sources/<name>/  a source that is given as text
<run_dir>/data/held_out/<name>/
"""

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from llama_jax.config import run as configs
from llama_jax.config.loading import ConfigError
from llama_jax.data.build import build
from llama_jax.data.corpus import texts
from llama_jax.data.documents import DataError
from llama_jax.data.shards import ShardedDocuments, open_shards
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.loading import load_tokenizer
from llama_jax.tokenizers.tokenizer import Tokenizer
from llama_jax.tokenizers.training import train_tokenizer


def open_tokenizer(config: configs.RunConfig, run_dir: Path) -> Tokenizer:
    """The run's tokenizer; one to be trained is trained once and then read back.

    Raises:
      ConfigError: its ids don't fit the model, or there is no text to train it on.
      TokenizerError: a file that can't be used.
    """
    match config.tokenizer:
        case configs.ByteTokenizer():
            tokenizer = ByteTokenizer()
        case configs.TokenizerFile(path=path):
            tokenizer = load_tokenizer(path)
        case configs.TrainedTokenizer(vocab_size=vocab_size):
            sources = [source.text for source in config.data.sources if source.text is not None]
            tokenizer = _trained(sources, vocab_size, run_dir / "tokenizer")
    # An embedding lookup past the end is clamped in silence, so it has to be caught here.
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{config.model.vocab_size} is less than the tokenizer's {tokenizer.vocab_size}",
            key="model.vocab_size",
        )
    return tokenizer


def open_documents(
    config: configs.DataConfig,
    part: Literal["sources", "held_out"],
    tokenizer: Tokenizer,
    run_dir: Path,
    *,
    workers: int,
    progress: bool,
) -> list[ShardedDocuments]:
    """The documents of each of `config.sources` or `config.held_out`, in order.

    Text is tokenised on first use; afterwards the folder is checked against the text and reused.

    Args:
      config: the data table.
      part: which of its lists.
      tokenizer: the run's.
      run_dir: where built shards are kept.
      workers: processes that tokenise.
      progress: draw a bar while tokenising.

    Raises:
      DataError: shards made with another tokenizer, or whatever `build` and `open_shards` raise.
    """
    opened = []
    for source in getattr(config, part):
        if source.text is not None:
            folder = run_dir / "data" / part / source.name
            build(source.text, tokenizer, folder, workers=workers, strict=False, progress=progress)
        else:
            folder = Path(source.shards)
        documents = open_shards(folder)
        if documents.manifest.tokenizer != tokenizer.fingerprint:
            raise DataError(f"{folder} was built with another tokenizer than the run's")
        opened.append(documents)
    return opened


def _trained(sources: Sequence[configs.TextConfig], vocab_size: int, folder: Path) -> Tokenizer:
    if not folder.exists():
        if not sources:
            raise ConfigError("there is no source given as text to train it on", key="tokenizer")
        made = train_tokenizer(_all_texts(sources), vocab_size)
        # Renamed when whole: a run killed here must not find half a tokenizer.
        unfinished = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
        made.save(unfinished)
        unfinished.replace(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"{folder} has {tokenizer.vocab_size} tokens, {vocab_size} are asked for; "
            "delete it or use another run directory",
            key="tokenizer.vocab_size",
        )
    return tokenizer


def _all_texts(sources: Iterable[configs.TextConfig]) -> Iterable[str]:
    return itertools.chain.from_iterable(map(texts, sources))
