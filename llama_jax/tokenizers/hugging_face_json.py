"""Any Hugging Face `tokenizer.json`, run by the `tokenizers` library.

The file decides the ids; `tokenizer_config.json` beside it names the begin, end and padding tokens.
Unlike in transformers, special tokens are looked for in text only where they are allowed.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.tokenizers.hugging_face import CONFIG_FILE
from llama_jax.tokenizers.hugging_face_spelling import make_spelling
from llama_jax.tokenizers.spelling import Spelling
from llama_jax.tokenizers.streaming import decode_all
from llama_jax.tokenizers.tokenizer import (
    TokenizerError,
    check_allowed,
    require_id,
    valid_unicode,
)

if TYPE_CHECKING:
    import tokenizers

DEFINITION_FILE = "tokenizer.json"
_ROLES = ("bos", "eos", "pad", "unk")
# What begins and ends text where no file beside tokenizer.json says it.
_KNOWN_PAIRS = (("<|begin_of_text|>", "<|end_of_text|>"), ("<s>", "</s>"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_DECIDES_IDS = ("model", "added_tokens", "normalizer", "pre_tokenizer")


class HuggingFaceTokenizer:
    """A `tokenizer.json` and what stands beside it.

    Args:
      definition: the text of `tokenizer.json`.
      config: the content of `tokenizer_config.json`: `bos_token`, `eos_token`, `pad_token`,
        `unk_token`, `add_bos_token`, `added_tokens_decoder`; other keys are kept for `save`, all
        but the chat template.

    Raises:
      TokenizerError: `tokenizers` can't read it, or it has a decoder that is not known.
    """

    def __init__(self, definition: str, config: Mapping[str, Any]) -> None:
        self.definition = definition
        self.config = {key: config[key] for key in config if key != "chat_template"}
        self._plain = _read(definition)
        # All but the vocabulary, which is large and held by the library.
        self.parts = json.loads(definition)
        self.parts["model"] = {
            key: value
            for key, value in self.parts["model"].items()
            if key not in ("vocab", "merges")
        }
        self.added = [*self.parts["added_tokens"], *self._missing_tokens()]
        self._plain = self._encoder_of(self.added, special_is_text=True)
        self._vocab = self._plain.get_vocab(with_added_tokens=True)
        self._special = {t["content"]: t["id"] for t in self.added if t["special"]}
        self._encoders: dict[frozenset[str], tokenizers.Tokenizer] = {}
        self._spelling = make_spelling(self.parts, self._vocab, self.added)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self._spelling.pieces)

    @property
    def spelling(self) -> Spelling:
        """By the kind of decoder that the file names."""
        return self._spelling

    @property
    def special(self) -> Mapping[str, int]:
        """The added tokens that are marked as special, by name."""
        return self._special

    @property
    def bos_id(self) -> int:
        """Begins every document."""
        return require_id(self.role("bos"), "begin (bos)")

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        return require_id(self.role("eos"), "end (eos)")

    @property
    def pad_id(self) -> int:
        """Fills rows; an end token that the files name for it is not taken."""
        pad_id = self.role("pad")
        return require_id(None if pad_id == self.role("eos") else pad_id, "padding (pad)")

    @property
    def adds_bos(self) -> bool:
        """What the post-processor does; where there is none, `add_bos_token` of the config."""
        return self._adds_bos

    @functools.cached_property
    def _adds_bos(self) -> bool:
        if self.parts.get("post_processor") is None:
            return bool(self.config.get("add_bos_token", False)) and self.role("bos") is not None
        added = self._plain.encode("", add_special_tokens=True).ids
        return bool(added) and added[0] == self.role("bos")

    @property
    def fingerprint(self) -> str:
        """Of all that decides ids in `tokenizer.json`, and the roles."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        definition = json.loads(self.definition)
        parts = [definition.get(key) for key in _DECIDES_IDS]
        text = json.dumps([parts, self.added, [self.role(role) for role in _ROLES]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        allowed_special: AbstractSet[str] = frozenset(),
    ) -> list[int]:
        """The ids of `text`; see `Tokenizer.encode`.

        Added tokens that are not marked as special are found in any text, as the file says.
        """
        check_allowed(allowed_special, self._special)
        encoder = self._encoder(frozenset(allowed_special))
        ids = encoder.encode(valid_unicode(text), add_special_tokens=False).ids
        return [*([self.bos_id] if bos else []), *ids, *([self.eos_id] if eos else [])]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; see `Tokenizer.decode`."""
        return decode_all(self, ids, skip_special=skip_special)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, as it was read, and `tokenizer_config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DEFINITION_FILE).write_text(self.definition, encoding="utf-8")
        given = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        table = {**given, **self.config, "add_bos_token": self.adds_bos}
        text = json.dumps(table, ensure_ascii=False, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

    def role(self, role: str) -> int | None:
        """The id of the `bos`, `eos`, `pad` or `unk` token, or None where no file names it."""
        name = name_of(self.config.get(f"{role}_token"))
        if name is None and "bos_token" not in self.config and role in ("bos", "eos"):
            pairs = (pair for pair in _KNOWN_PAIRS if set(pair) <= set(self._special))
            name = next(pairs, (None, None))[("bos", "eos").index(role)]
        return None if name is None else self._vocab.get(name)

    def _missing_tokens(self) -> list[dict[str, Any]]:
        """Tokens that the config names and `added_tokens` lacks; transformers adds them too."""
        known = {token["content"] for token in self.parts["added_tokens"]}
        found = {}
        for role in _ROLES:
            name = name_of(self.config.get(f"{role}_token"))
            token_id = None if name is None else self._plain.token_to_id(name)
            if token_id is not None:
                found[name] = _token(token_id, {"content": name, "special": True})
        for token_id, entry in self.config.get("added_tokens_decoder", {}).items():
            found[entry["content"]] = _token(int(token_id), entry)
        missing = [token for name, token in found.items() if name not in known]
        return sorted(missing, key=lambda token: token["id"])

    def _encoder(self, allowed: frozenset[str]) -> "tokenizers.Tokenizer":
        """One that finds the `allowed` tokens and takes other special tokens for text.

        The library passes over tokens marked as special, or over none; those that are allowed lose
        the mark.
        """
        if not allowed:
            return self._plain
        if allowed not in self._encoders:
            tokens = [
                {**token, "special": token["special"] and token["content"] not in allowed}
                for token in self.added
            ]
            self._encoders[allowed] = self._encoder_of(tokens, special_is_text=True)
        return self._encoders[allowed]

    def _encoder_of(
        self, added: Sequence[Mapping[str, Any]], *, special_is_text: bool
    ) -> "tokenizers.Tokenizer":
        """The same model, which is shared, with these added tokens."""
        from tokenizers import AddedToken, Tokenizer

        made = Tokenizer(self._plain.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if (value := getattr(self._plain, part)) is not None:
                setattr(made, part, value)
        for special, tokens in itertools.groupby(added, key=lambda token: token["special"]):
            add = made.add_special_tokens if special else made.add_tokens
            add([AddedToken(t["content"], **{flag: t[flag] for flag in _FLAGS}) for t in tokens])
        for token in added:
            _check_id(made, token)
        made.encode_special_tokens = special_is_text
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes get the file; each builds its own encoder.
        return HuggingFaceTokenizer, (self.definition, self.config)


def _read(definition: str) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_str(definition)
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(f"not a tokenizer.json: {str(error).splitlines()[0]}") from None
    # Left over from training with the file; ids would be dropped, added or drawn by lot.
    if getattr(made.model, "dropout", None) is not None:
        made.model.dropout = None
    return made


def _check_id(made: "tokenizers.Tokenizer", token: Mapping[str, Any]) -> None:
    found = made.token_to_id(token["content"])
    if found != token["id"]:
        raise TokenizerError(f"added token '{token['content']}' has id {token['id']}, not {found}")


def _token(token_id: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    flags = {**defaults, "special": False, **entry}
    return {"id": token_id, "content": flags["content"], **{flag: flags[flag] for flag in _FLAGS}}


def name_of(value: Any) -> str | None:
    """A token's name: configs hold it alone or in a table of flags."""
    return value.get("content") if isinstance(value, Mapping) else value
