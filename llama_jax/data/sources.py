"""A run's documents and tokenizer, opened; what isn't there yet is made, in the run directory.

<run_dir>/tokenizer/            trained on the run's own text, or a copy
<run_dir>/data/sources/<name>/  a source that is given as text
<run_dir>/data/held_out/<name>/
<run_dir>/chat_template.jinja   where the records' own table names one
"""

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llama_jax.config import run as configs
from llama_jax.config.loading import ConfigError
from llama_jax.data.build import build
from llama_jax.data.corpus import texts
from llama_jax.data.documents import DataError
from llama_jax.data.example_build import build_examples
from llama_jax.data.example_files import StoredExamples, open_examples
from llama_jax.data.examples import LossOn
from llama_jax.data.shards import ShardedDocuments, open_shards
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.chat.template_files import (
    TEMPLATE_FILE,
    find_chat_template,
    template_of_folder,
)
from llama_jax.tokenizers.loading import load_tokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from llama_jax.tokenizers.tokenizer import Tokenizer
from llama_jax.tokenizers.training import TRAINERS

TOKENIZER = "tokenizer"
StoredDocuments = ShardedDocuments | StoredExamples


def open_tokenizer(config: configs.RunConfig, run_dir: Path) -> Tokenizer:
    """The run's tokenizer, which afterwards stands in the run directory whatever its kind.

    With the chat template that lies beside it, which is how records are written by default.

    Raises:
      ConfigError: its ids don't fit the model, there is no text to train it on, or the run
        directory holds another one.
      TokenizerError: a file that can't be used.
    """
    folder, wanted = run_dir / TOKENIZER, config.tokenizer
    found = load_tokenizer(folder) if folder.exists() else None
    if isinstance(wanted, configs.TrainedTokenizer):
        tokenizer = found or _train(config.data.sources, wanted)
        is_kind = isinstance(tokenizer, SentencePieceTokenizer) == (wanted.model == "sentencepiece")
        fits = is_kind and tokenizer.vocab_size == wanted.vocab_size
    else:
        is_file = isinstance(wanted, configs.TokenizerFile)
        tokenizer = load_tokenizer(wanted.path) if is_file else ByteTokenizer()
        fits = found is None or found.fingerprint == tokenizer.fingerprint
    if not fits:
        raise ConfigError(
            f"{folder} holds another one; delete it or use another run directory", key="tokenizer"
        )
    # An embedding lookup past the end is clamped in silence, so it has to be caught here.
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{config.model.vocab_size} is below the tokenizer's {tokenizer.vocab_size} tokens",
            key="model.vocab_size",
        )
    if found is None:
        has_files = isinstance(wanted, configs.TokenizerFile)
        _save_whole(tokenizer, folder, find_chat_template(Path(wanted.path)) if has_files else None)
    return tokenizer


def open_documents(
    config: configs.DataConfig,
    part: Literal["sources", "held_out"],
    tokenizer: Tokenizer,
    run_dir: Path,
    *,
    workers: int,
    progress: bool,
    loss_on: LossOn = "responses",
) -> list[StoredDocuments]:
    """The documents of each of `config.sources` or `config.held_out`, in order.

    Text is tokenised on first use; afterwards the folder is checked against the text and reused.

    Args:
      config: the data table.
      part: which of its lists.
      tokenizer: the run's.
      run_dir: where built shards are kept.
      workers: processes that tokenise.
      progress: draw a bar while tokenising.
      loss_on: what the objective reads of preferences; see `examples.LOSS_OF_OBJECTIVE`.

    Raises:
      ConfigError: responses behind a shared prompt where each is to be judged by its own tokens.
      DataError: shards made with another tokenizer, or whatever `build` and `open_shards` raise.
    """
    opened: list[StoredDocuments] = []
    for source in getattr(config, part):
        folder = Path(source.shards or run_dir / "data" / part / source.name)
        records = source.conversations or source.preferences
        if records is not None:
            _check_loss(source, part, loss_on)
            template = template_of_folder(run_dir / TOKENIZER)
            build_examples(records, config, tokenizer, folder, progress=progress, template=template)
            if part == "sources" and records is config.first_records:
                _keep_chat_template(records.chat_template, run_dir)
            opened.append(open_examples(folder, loss_on))
            continue
        if source.text is not None:
            build(source.text, tokenizer, folder, workers=workers, strict=False, progress=progress)
        documents = open_shards(folder)
        if documents.manifest.tokenizer != tokenizer.fingerprint:
            raise DataError(
                f"{folder} was made with another tokenizer ({documents.manifest.tokenizer}, "
                f"the run's is {tokenizer.fingerprint})"
            )
        opened.append(documents)
    return opened


def _keep_chat_template(path: str | None, run_dir: Path) -> None:
    """A copy of the file that the run's conversations are written by: a model is asked so too."""
    if path is not None:
        unfinished = run_dir / f".tmp-{os.getpid()}-{TEMPLATE_FILE}"
        shutil.copyfile(path, unfinished)
        unfinished.replace(run_dir / TEMPLATE_FILE)


def _check_loss(source: configs.SourceConfig, part: str, loss_on: LossOn) -> None:
    shared = source.preferences is not None and source.preferences.shared_prompt
    if shared and loss_on == "responses":
        raise ConfigError(
            "the responses would see each other; only a reward model may share the prompt",
            key=f"data.{part}.{source.name}.preferences.shared_prompt",
        )


def _train(sources: Sequence[configs.SourceConfig], wanted: configs.TrainedTokenizer) -> Tokenizer:
    given = [source.text for source in sources if source.text is not None]
    if not given:
        raise ConfigError("training one needs a source given as text", key="tokenizer.kind")
    train = TRAINERS[wanted.model]
    return train(itertools.chain.from_iterable(map(texts, given)), wanted.vocab_size)


def _save_whole(tokenizer: Tokenizer, folder: Path, template: str | None) -> None:
    """Save so that a run killed on the way leaves no half of a tokenizer to be found."""
    unfinished = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    tokenizer.save(unfinished)
    if template is not None:
        (unfinished / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    unfinished.replace(folder)
