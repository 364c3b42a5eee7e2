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
from llama_jax.tokenizers.splitting import LLAMA3_PATTERN
from llama_jax.tokenizers.tokenizer import Tokenizer, TokenizerError

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
    from tokenizers import AddedToken, decoders, models, processors
    from tokenizers import Tokenizer as Made

    # A piece that is a token itself is looked up before any merging, as tiktoken does.
    vocab, merges = vocab_and_merges(tokenizer.ranks)
    made = Made(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    made.pre_tokenizer = make_pre_tokenizer()  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    ordered = sorted(tokenizer.special, key=tokenizer.special.__getitem__)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ordered])
    begin = next(name for name in ordered if tokenizer.special[name] == tokenizer.bos_id)
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=[begin, "$A"],
        pair=[begin, "$A", f"{begin}:1", "$B:1"],
        special_tokens=[(begin, tokenizer.bos_id)],
    )
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
    ranked = sorted(ranks, key=lambda token: ranks[token])
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    # One letter a byte: the pairs are the same in either spelling.
    return vocab, merges_of([spelled[token] for token in ranked], vocab)


def _config_table(tokenizer: "TiktokenTokenizer") -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **role_names(tokenizer),
        "add_bos_token": tokenizer.adds_bos,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": added_tokens_decoder(tokenizer),
        CUT_KEY: tokenizer.cut_long_text,
    }


def added_token(token_id: int, name: str, *, special: bool = True) -> dict[str, Any]:
    """An entry of `added_tokens`, matched in the text as it is."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": name, **flags, "special": special}


def bos_template(name: str, bos_id: int) -> dict[str, Any]:
    """The post-processor that puts the begin token before a text."""
    begin = [{"SpecialToken": {"id": name, "type_id": kind}} for kind in (0, 1)]
    first, second = ({"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin[0], first],
        "pair": [begin[0], first, begin[1], second],
        "special_tokens": {name: {"id": name, "ids": [bos_id], "tokens": [name]}},
    }


def added_tokens_decoder(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The special tokens by id, as `tokenizer_config.json` has them."""
    names = {i: name for name, i in tokenizer.special.items()}
    entries = {str(i): added_token(i, names[i]) for i in sorted(names)}
    for entry in entries.values():
        del entry["id"]
    return entries


def role_names(tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token`, `eos_token` and `pad_token`, those that there are."""
    names = {i: name for name, i in tokenizer.special.items()}
    found = {}
    for role in ("bos", "eos", "pad"):
        try:
            found[f"{role}_token"] = names[getattr(tokenizer, f"{role}_id")]
        except TokenizerError:
            continue
    return found
