"""Opening a Hugging Face folder: config, safetensors with or without an index, chat template."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config.loading import nearest
from llama_jax.config.model import ModelConfig
from llama_jax.interchange.generation_defaults import (
    GenerationDefaults,
    from_generation_config,
)
from llama_jax.interchange.hugging_face_config import from_config_json
from llama_jax.interchange.hugging_face_names import (
    from_hugging_face,
    is_rotary_table,
    to_hugging_face,
)
from llama_jax.interchange.json_files import read_json
from llama_jax.interchange.safetensors_reading import Entry, read_header
from llama_jax.interchange.tensors import (
    REWARD_HEAD,
    InterchangeError,
    Slices,
    StoredTensor,
    any_nan,
)
from llama_jax.tokenizers import Tokenizer, TokenizerError, load_tokenizer
from llama_jax.tokenizers.chat.template_files import template_of_folder

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


class HuggingFaceSource:
    """A `Source` over a folder in Hugging Face's layout. Opening reads JSON and headers alone."""

    format = "hf"

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
          ConfigError: a `config.json` of another kind of model.
          InterchangeError: files that are absent, cut off or in contradiction.
        """
        self.path = folder
        table = read_json(folder / CONFIG_FILE)
        self.config: ModelConfig = from_config_json(table, str(folder / CONFIG_FILE))
        self.generation = _generation(folder, table, self.config.vocab_size)
        self.chat_template = read_chat_template(folder)
        entries = _entries(folder)
        self.tensors = {
            tensor.name: tensor
            for entry in entries.values()
            if not is_rotary_table(entry.name)
            for tensor in (stored_tensor(entry, from_hugging_face(entry.name)),)
        }

    def stored_name(self, name: str) -> str:
        """Such as `model.norm.weight`."""
        return to_hugging_face(name)

    def load_tokenizer(self) -> Tokenizer:
        """That of the folder's tokenizer files."""
        return load_tokenizer(self.path)


def read_chat_template(folder: Path) -> str | None:
    """That of the folder's tokenizer; see `tokenizers.chat.template_files`.

    Raises:
      InterchangeError: a template that is no text, or none of several is the default.
    """
    try:
        return template_of_folder(folder)
    except TokenizerError as error:
        raise InterchangeError(str(error)) from None


def _generation(folder: Path, config: dict[str, Any], vocab_size: int) -> GenerationDefaults:
    # Before there was a generation_config.json, config.json told these things.
    path = folder / GENERATION_FILE
    told_apart = path.is_file()
    path = path if told_apart else folder / CONFIG_FILE
    table = read_json(path) if told_apart else config
    if table.get("eos_token_id") is None and config.get("eos_token_id") is not None:
        table = {**table, "eos_token_id": config["eos_token_id"]}
    defaults = from_generation_config(table, str(path))
    defaults.check_ids(vocab_size, str(path))
    return defaults


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor by its name in the files, the index held against the headers."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    shards = sorted(path.name for path in folder.glob("*.safetensors") if _SHARD.match(path.name))
    if single.is_file() and index.is_file():
        raise InterchangeError(f"{folder}: both {SINGLE_FILE} and {INDEX_FILE}; remove one")
    if single.is_file():
        return read_header(single)
    if index.is_file():
        return _indexed(folder, shards)
    if shards:
        raise InterchangeError(f"{index}: no such file, though there is {shards[0]}")
    others = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {others[0]} is a pickle, only safetensors are read" if others else ""
    raise InterchangeError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _indexed(folder: Path, shards: list[str]) -> dict[str, Entry]:
    index = folder / INDEX_FILE
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise InterchangeError(f"{index}: weight_map: expected an object of file names")
    named = sorted(set(places.values()))
    for name in shards:
        if name not in named:
            raise InterchangeError(f"{folder / name}: not in {INDEX_FILE}")
    headers = {name: _shard_header(folder, name, places) for name in named}
    for name, entries in headers.items():
        for tensor in entries:
            _check_place(index, tensor, name, places)
    for tensor, name in places.items():
        if tensor not in headers[name]:
            raise InterchangeError(
                f"{folder / name}: tensor {tensor} is missing, though {INDEX_FILE} places it there"
                f"{nearest(tensor, list(headers[name]))}"
            )
    return {tensor: headers[name][tensor] for tensor, name in places.items()}


def _shard_header(folder: Path, name: str, places: dict[str, str]) -> dict[str, Entry]:
    if Path(name).name != name:
        raise InterchangeError(f"{folder / INDEX_FILE}: '{name}' is not a file of this folder")
    if not (folder / name).is_file():
        tensor = next(tensor for tensor, place in places.items() if place == name)
        raise InterchangeError(
            f"{folder / name}: no such file, though {INDEX_FILE} places {tensor} there"
        )
    return read_header(folder / name)


def _check_place(index: Path, tensor: str, name: str, places: dict[str, str]) -> None:
    if tensor not in places:
        raise InterchangeError(f"{index}: tensor {tensor} of {name} is missing in weight_map")
    if places[tensor] != name:
        raise InterchangeError(f"{index}: tensor {tensor} is in {name} and {places[tensor]}")


def stored_tensor(entry: Entry, name: str | None) -> StoredTensor:
    """A tensor of a safetensors file under a canonical name, or its own where it has none."""
    read, shape = entry.read, entry.shape
    if name == REWARD_HEAD and shape[:1] == (1,):
        # A matrix with one row there, a vector here.
        read, shape = _first_row(entry), shape[1:]
    return StoredTensor(
        name=name or entry.name,
        stored_name=entry.name,
        file=str(entry.path),
        shape=shape,
        dtype=entry.dtype,
        kind=entry.kind,
        read=read,
        has_nan=functools.partial(any_nan, read, shape, entry.dtype),
    )


def _first_row(entry: Entry) -> Callable[[Slices], np.ndarray]:
    def read(part: Slices) -> np.ndarray:
        return entry.read((slice(0, 1), *part))[0]

    return read


def open_hugging_face(folder: str | Path) -> HuggingFaceSource:
    """Open a folder in Hugging Face's layout. Errors as `HuggingFaceSource`."""
    return HuggingFaceSource(Path(folder))
