"""The same vocabulary for Hugging Face: `tokenizer.json` and `tokenizer_config.json`.

`tokenizer.json` gives the ids of `TiktokenTokenizer.encode` on every string when special tokens
are off (`encode_special_tokens = True`, `add_special_tokens=False`), but for the cuts that Llama
3's reference makes in very long text, which the format can't express.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.tokenizers.merges import merges_of
from llama_jax.tokenizers.special import BEGIN_OF_TEXT, END_OF_TEXT
from llama_jax.tokenizers.splitting import LLAMA3_PATTERN

if TYPE_CHECKING:
    import tokenizers

    from llama_jax.tokenizers.tiktoken import TiktokenTokenizer

CONFIG_FILE = "tokenizer_config.json"
# Our key beside Hugging Face's; see TiktokenTokenizer.
CUT_KEY = "cut_long_text"


def save_hugging_face(tokenizer: "TiktokenTokenizer", folder: Path) -> None:
    """Write both files into `folder`."""
    make_hugging_face(tokenizer).save(str(folder / "tokenizer.json"))
    text = json.dumps(_config_table(tokenizer), indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def make_hugging_face(tokenizer: "TiktokenTokenizer") -> "tokenizers.Tokenizer":
    """The equal tokenizer of the `tokenizers` library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    # A piece that is a token itself is looked up before any merging, as tiktoken does.
    vocab, merges = vocab_and_merges(tokenizer.ranks)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    made.pre_tokenizer = make_pre_tokenizer()  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    ordered = sorted(tokenizer.special, key=tokenizer.special.__getitem__)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ordered])
    return made


def make_pre_tokenizer() -> Any:
    """Llama 3's split pattern, then bytes as printable characters."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, letters])


def byte_letters() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def special_from_config(table: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens by name, from the `added_tokens_decoder` of a `tokenizer_config.json`."""
    added = table.get("added_tokens_decoder", {})
    return {entry["content"]: int(token_id) for token_id, entry in added.items()}


def vocab_and_merges(
    ranks: Mapping[bytes, int],
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens in GPT-2's letters, and the merges that tiktoken would do, first ones first."""
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = merges_of(sorted(ranks, key=ranks.__getitem__), ranks)
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    return vocab, [(spelled[a], spelled[b]) for a, b in merges]


def _config_table(tokenizer: "TiktokenTokenizer") -> dict[str, Any]:
    names = {token_id: name for name, token_id in tokenizer.special.items()}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": names[i], **flags, "special": True} for i in sorted(names)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": names[tokenizer.pad_id],
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": added,
        CUT_KEY: tokenizer.cut_long_text,
    }
