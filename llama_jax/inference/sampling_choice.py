"""How to draw tokens: what a person asks for, what the model's files say, and what remains."""

import contextlib
from dataclasses import asdict, dataclass

from llama_jax.inference.sampling import Sampling
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.tokenizers import Tokenizer, TokenizerError
from llama_jax.tokenizers.chat import ChatFormat

# Meta's reference code draws so, for every Llama (llama-models, `models/llama3/generation.py`).
# Taken where neither the person nor the model's files say anything about drawing.
REFERENCE_TEMPERATURE, REFERENCE_TOP_P = 0.6, 0.9
_FILTERS = ("top_k", "top_p", "min_p")
_DRAWING = ("temperature", *_FILTERS)


@dataclass(frozen=True)
class Wishes:
    """What was asked for; None leaves it to the model's files."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False


def choose_sampling(
    wishes: Wishes,
    defaults: GenerationDefaults,
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
) -> Sampling:
    """The sampling of `wishes`, completed by the model's defaults.

    Raises:
      ConfigError: a value out of range.
    """
    asked = {name: value for name, value in asdict(wishes).items() if value is not None}
    told = {name: getattr(defaults, name) for name in (*_DRAWING, "repetition_penalty")}
    told = {name: value for name, value in told.items() if value is not None}
    if not told.keys() & set(_DRAWING):
        told["temperature"] = REFERENCE_TEMPERATURE
        if not asked.keys() & set(_DRAWING):
            told["top_p"] = REFERENCE_TOP_P
    if asked.get("temperature", told.get("temperature")) == 0:
        # What the files say about drawing is void where nothing is drawn.
        told = {name: value for name, value in told.items() if name not in _FILTERS}
    return Sampling(max_new_tokens=max_new_tokens, stop_ids=stop_ids, **(told | asked))


def choose_stop_ids(
    tokenizer: Tokenizer, defaults: GenerationDefaults, chat_format: ChatFormat | None
) -> frozenset[int]:
    """The set of ids that end a completion.

    Those that the model's files name, else the vocabulary's end token; in a conversation also the
    ends of the chat format, which a base model's files don't name.
    """
    stop_ids = set(defaults.stop_ids)
    if not stop_ids:
        # A vocabulary may have no end: only a length ends its texts.
        with contextlib.suppress(TokenizerError):
            stop_ids.add(tokenizer.eos_id)
    if chat_format is not None:
        stop_ids |= {tokenizer.special[name] for name in chat_format.stop_tokens}
    return frozenset(stop_ids)
