"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Its matrices are [out, in] in Hugging Face's own order of rotary pairs, which is the canonical one.
"""

import re
from pathlib import Path

from llama_jax.config.post_training import AdapterConfig
from llama_jax.interchange.adapters import AdapterSource, adapted_names
from llama_jax.interchange.casting import dtype_named
from llama_jax.interchange.hugging_face import read_chat_template, stored_tensor
from llama_jax.interchange.hugging_face_names import from_hugging_face, to_hugging_face
from llama_jax.interchange.hugging_face_writing import as_hugging_face
from llama_jax.interchange.json_files import read_json, write_json
from llama_jax.interchange.peft_config import (
    adapts_some_layers,
    from_peft_config,
    to_peft_config,
)
from llama_jax.interchange.safetensors_reading import read_header
from llama_jax.interchange.safetensors_writing import Plan, write_safetensors
from llama_jax.interchange.tensors import REWARD_HEAD, InterchangeError, StoredTensor
from llama_jax.models.lora import DORA_SCALE, LORA_A, LORA_B

PEFT_CONFIG_FILE, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDS = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight", DORA_SCALE: "lora_magnitude_vector"}
_STORED = re.compile(
    r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_ENDS_BACK = {stored.removesuffix(".weight"): end for end, stored in _ENDS.items()}
_SCORE = re.compile(r"base_model\.model\.score(?:\.modules_to_save)?(?:\.default)?\.weight")


class PeftAdapter:
    """An `AdapterSource` over such a folder. Opening reads JSON and a header alone."""

    chat_format = None

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
          ConfigError: an adapter of another kind, or with something that isn't supported.
          InterchangeError: files that are absent or damaged.
        """
        self.path = folder
        table = read_json(folder / PEFT_CONFIG_FILE)
        if not (folder / PEFT_FILE).is_file():
            others = sorted(path.name for path in folder.glob("adapter_model.*"))
            hint = f"; {others[0]} is a pickle, only safetensors are read" if others else ""
            raise InterchangeError(f"{folder / PEFT_FILE}: no such file{hint}")
        self.tensors: dict[str, StoredTensor] = {}
        for entry in read_header(folder / PEFT_FILE).values():
            tensor = stored_tensor(entry, _canonical(entry.name))
            self.tensors[tensor.name] = tensor
        projections = {name.rpartition(".")[2] for name in adapted_names(self.tensors)}
        file = str(folder / PEFT_CONFIG_FILE)
        self.config: AdapterConfig = from_peft_config(table, projections, file)
        self.partial = adapts_some_layers(table)
        self.base: str | None = table.get("base_model_name_or_path")
        self.chat_template = read_chat_template(folder)


def write_peft(
    adapter: AdapterSource, folder: Path, base: str, head_dim: int, *, dtype: str | None = None
) -> None:
    """Write an adapter as PEFT does.

    Args:
      base: what its config names as the checkpoint that it belongs to.
      dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = [
        Plan(_stored(name), as_hugging_face(tensor), dtype_named(dtype) if dtype else tensor.dtype)
        for name, tensor in adapter.tensors.items()
    ]
    write_safetensors(folder / PEFT_FILE, plans, head_dim)
    some = sorted(map(_module, adapted_names(adapter.tensors))) if adapter.partial else ()
    reward = REWARD_HEAD in adapter.tensors
    table = to_peft_config(adapter.config, base, reward=reward, modules=some)
    write_json(folder / PEFT_CONFIG_FILE, table)


def _canonical(stored: str) -> str | None:
    if _SCORE.fullmatch(stored):
        return REWARD_HEAD
    found = _STORED.fullmatch(stored)
    if found is None:
        return None
    # Adapters of a model without a head leave the first `model.` out.
    module = found[1] if found[1].startswith("model.") else f"model.{found[1]}"
    weight = from_hugging_face(f"{module}.weight")
    return None if weight is None else f"{weight}{_ENDS_BACK[found[2]]}"


def _stored(name: str) -> str:
    if name == REWARD_HEAD:
        return f"{_PREFIX}score.weight"
    end = next(end for end in _ENDS if name.endswith(end))
    return f"{_PREFIX}{_module(name.removesuffix(end))}.{_ENDS[end]}"


def _module(weight: str) -> str:
    return to_hugging_face(weight).removesuffix(".weight")
