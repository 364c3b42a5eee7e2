"""Our own folder of a model alone: `model.toml`, `params/` by Orbax, tokenizer, chat template.

Beside them lie Hugging Face's `generation_config.json` and `chat_template.jinja`.
"""

from pathlib import Path

import numpy as np
from flax import nnx

from llama_jax.config.loading import from_table, read_toml, to_table, to_toml
from llama_jax.config.model import ModelConfig
from llama_jax.interchange.casting import dtype_named, read_cast
from llama_jax.interchange.generation_defaults import from_generation_config
from llama_jax.interchange.hugging_face import GENERATION_FILE, read_chat_template
from llama_jax.interchange.hugging_face_writing import write_side_files
from llama_jax.interchange.json_files import read_json
from llama_jax.interchange.orbax_arrays import StackedArrays, save_stacked
from llama_jax.interchange.source import Source
from llama_jax.interchange.tensors import canonical_shapes
from llama_jax.tokenizers import Tokenizer, load_tokenizer

MODEL_FILE, PARAMS_FOLDER = "model.toml", "params"


class OrbaxSource:
    """A `Source` over such a folder."""

    format = "orbax"

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
          ConfigError: a wrong `model.toml`.
          InterchangeError: arrays that are absent, unreadable or of another model.
        """
        self.path = folder
        file = folder / MODEL_FILE
        self.config: ModelConfig = from_table(ModelConfig, read_toml(file), str(file))
        path = folder / GENERATION_FILE
        self.generation = from_generation_config(read_json(path), str(path))
        self.generation.check_ids(self.config.vocab_size, str(path))
        self.chat_template = read_chat_template(folder)
        self._arrays = StackedArrays(folder.absolute() / PARAMS_FOLDER, self.config)
        self.tensors = self._arrays.tensors()

    def stored_name(self, name: str) -> str:
        """The canonical one."""
        return name

    def load_tokenizer(self) -> Tokenizer:
        """That of the folder's tokenizer files."""
        return load_tokenizer(self.path)

    def restore(self, abstract: nnx.State) -> nnx.State:
        """All parameters at once, straight into their shards."""
        return self._arrays.restore(abstract)


def write_orbax(
    source: Source, folder: Path, *, dtype: str | None = None, tokenizer: Tokenizer | None = None
) -> None:
    """Write `source` as such a folder; the host holds the parameters once.

    Args:
      dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's own.

    Raises:
      InterchangeError: a value too large for float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    toml = to_toml(to_table(source.config))
    (folder / MODEL_FILE).write_text(toml, encoding="utf-8")
    write_side_files(source, folder, tokenizer)

    def read(name: str, dtype: np.dtype) -> np.ndarray:
        tensor = source.tensors[name]
        return read_cast(tensor, tuple(slice(0, size) for size in tensor.shape), dtype)

    dtypes = {
        name: source.tensors[name].dtype if dtype is None else dtype_named(dtype)
        for name in canonical_shapes(source.config)
    }
    save_stacked(folder.absolute() / PARAMS_FOLDER, source.config, read, dtypes)
