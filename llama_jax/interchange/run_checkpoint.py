"""A training run's own checkpoint as a source: its parameters alone, never the moments.

A run that trained adapters has only these: its source is the checkpoint that it started from, with
them merged into it.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from flax import nnx

from llama_jax.config.files import load_run_config
from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import RunConfig
from llama_jax.config.run_files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    ORIGINS_FILE,
    TOKENIZER_FOLDER,
    checkpoint_path,
)
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.hugging_face import read_chat_template
from llama_jax.interchange.orbax_arrays import StackedArrays
from llama_jax.interchange.tensors import InterchangeError, Shape
from llama_jax.models.accounting import param_shapes
from llama_jax.models.lora import trainable_paths
from llama_jax.tokenizers import Tokenizer, load_tokenizer
from llama_jax.tokenizers.chat import ChatFormat, make_chat_format
from llama_jax.tokenizers.chat.template_files import TEMPLATE_FILE
from llama_jax.tokenizers.tokenizer import id_or_none

_STEP = re.compile(r"step_(\d+)")


class RunCheckpoint:
    """One checkpoint of a run, and what lies beside it: what a source says but for its weights."""

    format = "run"

    def __init__(self, run_dir: Path, step: int | None = None) -> None:
        """Open the checkpoint of `step`, by default the newest.

        Raises:
          ConfigError: a wrong `config.toml`.
          InterchangeError: no such checkpoint.
        """
        self.run_dir = run_dir.absolute()
        self.run: RunConfig = load_run_config(str(run_dir / CONFIG_FILE))
        self.step = _chosen(run_dir, step)
        self.path = run_dir / CHECKPOINTS_FOLDER / f"step_{self.step}"

    def arrays(self, shapes: Mapping[tuple[str, ...], Shape]) -> StackedArrays:
        """Its parameters of these shapes, by path.

        Raises:
          InterchangeError: arrays that can't be read, or are others.
        """
        return StackedArrays(
            self.run_dir / CHECKPOINTS_FOLDER / f"step_{self.step}" / "state",
            self.run.model,
            # What the run is judged by; its `params` are for going on.
            prefix="params." if self.run.training.ema_decay is None else "averaged.",
            shapes=shapes,
        )

    @property
    def chat_template(self) -> str | None:
        """The one that its first records were written with; None if that is a format of ours.

        Raises:
          InterchangeError: a template that can't be read, or of which the run has no copy.
        """
        records = self.run.data.first_records
        if records is None or records.chat_format in (None, "template"):
            if records is None or not records.chat_template:
                return read_chat_template(self.run_dir / TOKENIZER_FOLDER)
            return self._own_template(records.chat_template)
        return None

    @property
    def chat_format(self) -> str | None:
        """The name of the format of ours that its first records were written in, if it was one."""
        chat = self._chat
        return None if chat is None or chat.name == "template" else chat.name

    @property
    def generation(self) -> GenerationDefaults:
        """Texts end with the end token, and where the run had records with their ends of turns."""
        tokenizer, chat = self.load_tokenizer(), self._chat
        ends = {tokenizer.special[name] for name in chat.stop_tokens} if chat else set[int]()
        return GenerationDefaults(
            stop_ids=frozenset({tokenizer.eos_id} | ends),
            bos_id=id_or_none(tokenizer, "bos"),
            # None of its own where rows are padded with what ends texts.
            pad_id=id_or_none(tokenizer, "pad"),
            chat_format=self.chat_format,
        )

    def load_tokenizer(self) -> Tokenizer:
        """That of the run."""
        return load_tokenizer(self.run_dir / TOKENIZER_FOLDER)

    @functools.cached_property
    def _chat(self) -> ChatFormat | None:
        records = self.run.data.first_records
        if records is None:
            return None
        name = None if records.chat_template else records.chat_format
        return make_chat_format(self.load_tokenizer(), name=name, template=self.chat_template)

    def _own_template(self, path: str) -> str:
        try:
            return (self.run_dir / TEMPLATE_FILE).read_text(encoding="utf-8")
        except OSError as error:
            raise InterchangeError(
                f"{self.run_dir / TEMPLATE_FILE}: {error.strerror}; it is the copy of {path}, by "
                "which the run's records were written"
            ) from None


class RunSource(RunCheckpoint):
    """A `Source` over one checkpoint of a run that trained all of a model."""

    def __init__(self, run_dir: Path, step: int | None = None) -> None:
        """Open the checkpoint of `step`, by default the newest.

        Raises:
          ConfigError: a wrong `config.toml`.
          InterchangeError: no such checkpoint, or one that can't be read.
        """
        super().__init__(run_dir, step)
        self.config: ModelConfig = self.run.model
        self._arrays = self.arrays(param_shapes(self.config))
        self.tensors = self._arrays.tensors()

    def stored_name(self, name: str) -> str:
        """The canonical one."""
        return name

    def restore(self, abstract: nnx.State) -> nnx.State:
        """All parameters at once, straight into their shards."""
        return self._arrays.restore(abstract)


class RunAdapter(RunCheckpoint):
    """An `AdapterSource` over one checkpoint of a run that trained adapters.

    Attributes:
      base: the checkpoint that the run started from.
      starts_rows: whether rows of its special tokens were given another start.
      origins: fingerprints of what it read, by key of its config; of earlier versions none.
    """

    partial = False

    def __init__(self, run_dir: Path, step: int | None = None) -> None:
        """Open the checkpoint of `step`, by default the newest.

        Raises:
          ConfigError: a wrong `config.toml`, such as one with adapters and no `init`.
          InterchangeError: no such checkpoint, one that can't be read, or a run without adapters.
        """
        super().__init__(run_dir, step)
        if self.run.adapter is None:
            raise InterchangeError(f"{run_dir}: a run that trained no adapter")
        # A run's file with adapters alone is refused when it is read.
        assert self.run.init is not None
        self.config: AdapterConfig = self.run.adapter
        self.base = str(checkpoint_path(self.run.init.path))
        self.starts_rows = self.run.init.special_rows == "mean"
        origins = run_dir / ORIGINS_FILE
        self.origins: dict[str, str] = (
            json.loads(origins.read_text(encoding="utf-8")) if origins.is_file() else {}
        )
        shapes = param_shapes(self.run.model, self.config)
        trained = self.arrays({path: shapes[path] for path in trainable_paths(shapes)})
        self.tensors = trained.tensors()


def steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    folder = run_dir / CHECKPOINTS_FOLDER
    if not folder.is_dir():
        return []
    # One being written has a longer name until it is complete.
    names = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def run_of_checkpoint(path: Path) -> tuple[Path, int] | None:
    """The run and step of `RUN/checkpoints/step_N`, or None where `path` isn't such a folder."""
    found = _STEP.fullmatch(path.name)
    if found is None or path.parent.name != CHECKPOINTS_FOLDER:
        return None
    return path.parent.parent, int(found[1])


def _chosen(run_dir: Path, step: int | None) -> int:
    known = steps(run_dir)
    if not known:
        raise InterchangeError(f"{run_dir / CHECKPOINTS_FOLDER}: no complete checkpoint")
    if step is not None and step not in known:
        raise InterchangeError(
            f"{run_dir / CHECKPOINTS_FOLDER}: no step {step}; there are "
            f"{', '.join(map(str, known))}"
        )
    return known[-1] if step is None else step
