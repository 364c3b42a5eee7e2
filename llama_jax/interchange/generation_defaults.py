"""What a checkpoint says about generating from it: stop ids and sampling defaults.

Owns Hugging Face's `generation_config.json` too, which our own folders carry as well.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llama_jax.interchange.tensors import InterchangeError

# Our field, and the key of `generation_config.json`.
_IDS = {"bos_id": "bos_token_id", "pad_id": "pad_token_id"}
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """None, or no stop ids, where the checkpoint doesn't say.

    Attributes:
      stop_ids: every id that ends a completion; files give a number or a list.
      temperature: 0 where a file says not to sample.
      chat_format: the name of the one that a run was trained with; no file of others has it.
    """

    stop_ids: frozenset[int] = frozenset()
    bos_id: int | None = None
    pad_id: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    chat_format: str | None = None

    def check_ids(self, vocab_size: int, file: str) -> None:
        """Raise `InterchangeError` for an id outside the vocabulary: it would never come."""
        ids = [("eos_token_id", i) for i in sorted(self.stop_ids)]
        ids += [(key, getattr(self, field)) for field, key in _IDS.items()]
        for key, token_id in ids:
            if token_id is not None and not 0 <= token_id < vocab_size:
                raise InterchangeError(
                    f"{file}: {key}: {token_id} is outside the vocabulary of {vocab_size}"
                )


def from_generation_config(table: Mapping[str, Any], file: str) -> GenerationDefaults:
    """The defaults that a `generation_config.json` states or an old `config.json`.

    Raises:
      InterchangeError: a value of the wrong type, with its key.
    """
    values: dict[str, Any] = {field: _token_id(table, key, file) for field, key in _IDS.items()}
    if values["pad_id"] == -1:
        # The first conversions of Llama 1 say so that there is none.
        values["pad_id"] = None
    values |= {key: _number(table, key, file) for key in _NUMBERS}
    values["top_k"] = _token_id(table, "top_k", file)
    if table.get("do_sample") is False:
        values["temperature"] = 0.0
    return GenerationDefaults(stop_ids=_stop_ids(table, file), **values)


def to_generation_config(defaults: GenerationDefaults) -> dict[str, Any]:
    """The inverse: what is unset is left out; one stop id is a number, several a list."""
    table: dict[str, Any] = {}
    stop_ids = sorted(defaults.stop_ids)
    if stop_ids:
        table["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    for field, key in _IDS.items():
        if getattr(defaults, field) is not None:
            table[key] = getattr(defaults, field)
    for key in (*_NUMBERS, "top_k"):
        if getattr(defaults, key) is not None:
            table[key] = getattr(defaults, key)
    if table.get("temperature") == 0:
        # transformers refuses a temperature of 0; greedy is said so.
        del table["temperature"]
        table["do_sample"] = False
    elif {"temperature", "top_p", "top_k", "min_p"} & table.keys():
        table["do_sample"] = True
    return table


def _stop_ids(table: Mapping[str, Any], file: str) -> frozenset[int]:
    value = table.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int:
            raise InterchangeError(f"{file}: eos_token_id: {token_id!r} is not a token id")
    return frozenset(ids)


def _token_id(table: Mapping[str, Any], key: str, file: str) -> int | None:
    value = table.get(key)
    if value is not None and type(value) is not int:
        raise InterchangeError(f"{file}: {key}: {value!r} is not a whole number")
    return value


def _number(table: Mapping[str, Any], key: str, file: str) -> float | None:
    value = table.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InterchangeError(f"{file}: {key}: {value!r} is not a number")
    return float(value)
