"""Training vocabularies; here a byte-level BPE with the Llama 3 split pattern.

The same text in the same order gives the same vocabulary, byte for byte.
"""

from collections.abc import Callable, Iterable, Mapping

from llama_jax.tokenizers.hugging_face import byte_letters, make_pre_tokenizer
from llama_jax.tokenizers.sentencepiece_training import train_sentencepiece
from llama_jax.tokenizers.special import SMALL_SPECIAL_COUNT, special_tokens
from llama_jax.tokenizers.tiktoken import TiktokenTokenizer
from llama_jax.tokenizers.tokenizer import Tokenizer, TokenizerError


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TiktokenTokenizer:
    """A vocabulary of `vocab_size` tokens, 16 special ones and the 256 bytes included.

    Raises:
      TokenizerError: the text has too few different words for so many tokens.
    """
    ranks = _train_ranks(texts, vocab_size - SMALL_SPECIAL_COUNT)
    special = special_tokens(len(ranks), SMALL_SPECIAL_COUNT)
    made = TiktokenTokenizer(ranks, special, cut_long_text=False)
    if made.vocab_size != vocab_size:
        raise TokenizerError(
            f"the text gives {made.vocab_size} tokens, {vocab_size} were asked for;"
            " ask for fewer, or give more text"
        )
    return made


# How to train each kind of vocabulary, from texts and a number of tokens.
TRAINERS: Mapping[str, Callable[[Iterable[str], int], Tokenizer]] = {
    "tiktoken": train_tokenizer,
    "sentencepiece": train_sentencepiece,
}


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes a token over `texts`, without begin and end tokens; 0 without text."""
    size = tokens = 0
    for text in texts:
        size += len(text.encode("utf-8", "replace"))
        tokens += len(tokenizer.encode(text))
    return size / tokens if tokens else 0.0


def _train_ranks(texts: Iterable[str], count: int) -> dict[bytes, int]:
    from tokenizers import Tokenizer as Trained
    from tokenizers import models, trainers

    trained = Trained(models.BPE())
    trained.pre_tokenizer = make_pre_tokenizer()  # type: ignore[assignment]
    letters = byte_letters()
    trainer = trainers.BpeTrainer(
        vocab_size=count, initial_alphabet=sorted(letters.values()), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    bytes_of = {letter: byte for byte, letter in letters.items()}
    return {
        bytes(bytes_of[letter] for letter in token): rank
        for token, rank in trained.get_vocab().items()
    }
