"""A run's tokenizer and data: loaded, or made on first use inside the run directory."""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from etils import epath
from jax.sharding import Mesh

from llama_jax.config.run import DataConfig, RunConfig, TrainedTokenizer
from llama_jax.data.batches import Batches, held_out_batches, make_batches, resume_step
from llama_jax.data.corpus import texts
from llama_jax.data.device import host_rows
from llama_jax.data.examples import LOSS_OF_OBJECTIVE
from llama_jax.data.sources import StoredDocuments, open_documents, open_tokenizer
from llama_jax.tokenizers import Tokenizer
from llama_jax.training.distributed import wait_for_all
from llama_jax.training.held_out import HeldOutBatches

Say = Callable[[str], None]
Part = Literal["sources", "held_out"]
PARTS: tuple[Part, ...] = get_args(Part)
TOKENIZER = "tokenizer"
MOST_WORKERS = 8


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What goes into a run: the tokenizer, and the tokenised documents of each source."""

    tokenizer: Tokenizer
    sources: Sequence[StoredDocuments]
    held_out: Sequence[StoredDocuments]

    @property
    def train_tokens(self) -> int:
        """Tokens in the training sources, begin and end marks included."""
        return int(sum(documents.lengths.sum() for documents in self.sources))

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of text in the training sources."""
        return int(sum(documents.text_bytes.sum() for documents in self.sources))


def prepare_inputs(config: RunConfig, run_dir: epath.Path, say: Say) -> Inputs:
    """Load or make the tokenizer and the data.

    What is made stands in the run directory. Process 0 makes it and the others wait, for they
    see the same folder; where the run directory is an object store each process makes its own
    copy on local disk, the same to the byte.

    Raises:
      ConfigError: the model's vocabulary is smaller than the tokenizer's, or a source's path.
    """
    folder = local_folder(run_dir)
    alone = folder != Path(os.fspath(run_dir))
    if jax.process_index() == 0 or alone:
        inputs = _prepare(config, folder, say)
    wait_for_all("the tokenizer and the data are made")
    if jax.process_index() > 0 and not alone:
        inputs = _prepare(config, folder, say)
    return inputs


def local_folder(run_dir: epath.Path) -> Path:
    """The run directory, or for one in an object store a folder on local disk for it."""
    name = os.fspath(run_dir)
    if "://" not in name:
        return Path(name)
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / "llama_jax" / digest


def start_batches(
    config: RunConfig, inputs: Inputs, mesh: Mesh, position: dict[str, Any] | None
) -> Batches:
    """This host's rows of the training batches, from a checkpoint's position or from the first."""
    data, seed = config.data, config.seed
    start = 0
    if position is not None:
        start = resume_step(position, data, inputs.sources, seed=seed)
    rows = host_rows(mesh, data.batch_size).tolist()
    return make_batches(data, inputs.sources, rows=rows, seed=seed, start_step=start)


def held_out_passes(config: RunConfig, inputs: Inputs, mesh: Mesh) -> HeldOutBatches | None:
    """One pass over the held-out batches at each call; None when nothing is held out."""
    if not inputs.held_out:
        return None
    rows = host_rows(mesh, config.data.batch_size).tolist()
    count = config.training.eval_batches
    return lambda: held_out_batches(config.data, inputs.held_out, rows=rows, count=count)


def held_out_texts(data: DataConfig) -> Iterator[str] | None:
    """The held-out documents as text; None where one of them is given as shards only."""
    if not data.held_out or any(source.text is None for source in data.held_out):
        return None
    return (text for source in data.held_out if source.text for text in texts(source.text))


def _prepare(config: RunConfig, folder: Path, say: Say) -> Inputs:
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(config.tokenizer, TrainedTokenizer) and not (folder / TOKENIZER).exists():
        say(f"training a tokenizer of {config.tokenizer.vocab_size} tokens")
    tokenizer = open_tokenizer(config, folder)
    return Inputs(
        tokenizer,
        open_part(config, "sources", tokenizer, folder, say),
        open_part(config, "held_out", tokenizer, folder, say),
    )


def open_part(
    config: RunConfig, part: Part, tokenizer: Tokenizer, folder: Path, say: Say
) -> list[StoredDocuments]:
    """The tokenised documents of the sources or of what is held out, made in `folder` if absent."""
    opened = open_documents(
        config.data,
        part,
        tokenizer,
        folder,
        workers=min(os.cpu_count() or 1, MOST_WORKERS),
        progress=config.metrics.progress and jax.process_index() == 0,
        loss_on=LOSS_OF_OBJECTIVE.get(config.objective.kind, "responses"),
    )
    for documents in opened:
        skipped = sum(documents.manifest.skipped.values())
        if skipped:
            first = documents.manifest.problems[0]
            say(f"{documents.manifest.plan.source['path']}: {skipped} skipped; first: {first}")
    return opened
