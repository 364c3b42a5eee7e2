"""The pre-tokenizers that GGUF files name in `tokenizer.ggml.pre`, as `tokenizer.json` has them.

Names and flags are llama.cpp's; patterns are those of the models' own files, which llama.cpp
follows (but for contractions with a long s). Each cuts the pieces that the one before left.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from llama_jax.config.loading import nearest
from llama_jax.tokenizers.splitting import LLAMA3_PATTERN
from llama_jax.tokenizers.tokenizer import TokenizerError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_QWEN2 = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
# Spelled otherwise in tokenizer.json, and cutting in the same places.
_SAME = {_GPT2 + r"|\s+": _GPT2}


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging.

    Attributes:
      patterns: regular expressions, cutting one after the other.
      whole_words: a piece that is a token itself is not merged (`ignore_merges`).
      adds_bos: where the file doesn't say it.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


# The first name of each kind is the one that is written.
_KINDS: tuple[tuple[tuple[str, ...], PreTokenizer], ...] = (
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        PreTokenizer((LLAMA3_PATTERN,), whole_words=True, adds_bos=True),
    ),
    (("dbrx", "smaug-bpe"), PreTokenizer((LLAMA3_PATTERN,))),
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        PreTokenizer((r"\p{N}", _GPT2)),
    ),
    (
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "trillion", "exaone4"),
        PreTokenizer((_GPT2,)),
    ),
    (
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "grok-2"),
        PreTokenizer((_QWEN2,)),
    ),
    (
        ("default",),
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    ),
    (("falcon",), PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    (("bloom", "poro-chat", "gpt3-finnish"), PreTokenizer((_BLOOM,))),
    (("viking",), PreTokenizer((_BLOOM, r"\p{N}"))),
)
_BY_NAME = {name: kind for names, kind in _KINDS for name in names}
_NAMES = {kind.patterns: names[0] for names, kind in reversed(_KINDS)}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of that name.

    Raises:
      TokenizerError: not known; says which are.
    """
    if name not in _BY_NAME:
        hint = nearest(name, list(_BY_NAME))
        raise TokenizerError(f"tokenizer.ggml.pre: unknown pre-tokenizer '{name}'{hint}")
    return _BY_NAME[name]


def to_json(kind: PreTokenizer) -> dict[str, Any]:
    """As `tokenizer.json` has it, bytes as GPT-2's letters at the end."""
    cuts = [_split(pattern) for pattern in kind.patterns]
    letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {"type": "Sequence", "pretokenizers": [*cuts, letters]}


def name_of(definition: Mapping[str, Any] | None) -> str:
    """The GGUF name of a `pre_tokenizer` of `tokenizer.json`.

    Raises:
      TokenizerError: no name stands for it.
    """
    patterns = tuple(_patterns(definition))
    if patterns not in _NAMES:
        shown = " then ".join(patterns) or "none"
        raise TokenizerError(f"no GGUF pre-tokenizer cuts text by this pattern: {shown}")
    return _NAMES[patterns]


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _patterns(step: Mapping[str, Any] | None) -> Iterable[str]:
    """The patterns of a pre-tokenizer; what is no pattern is named, and then found nowhere."""
    if step is None:
        return
    kind = step["type"]
    if kind == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _patterns(inner)
    elif step == _split(step.get("pattern", {}).get("Regex", "")):
        pattern = str(step["pattern"]["Regex"])
        yield _SAME.get(pattern, pattern)
    elif kind == "Digits":
        yield r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    elif kind == "ByteLevel" and not step["add_prefix_space"]:
        if step.get("use_regex", True):
            yield _GPT2
    else:
        yield f"<{kind}>"
