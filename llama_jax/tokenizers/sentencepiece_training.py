"""Training a SentencePiece vocabulary with Llama 2's settings.

BPE on text as it is, digits one by one, runs of spaces as pieces, bytes for what is rare: ids are
`<unk>` 0, `<s>` 1, `</s>` 2, bytes 3 to 258, then pieces. The same text in the same order gives the
same file, byte for byte.
"""

import io
import re
from collections.abc import Iterable, Iterator

from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from llama_jax.tokenizers.tokenizer import TokenizerError, valid_unicode

# Line ends and tabs are bytes in Llama 2's vocabulary. The trainer would drop NUL and tab and join
# what stands around them, and drop a whole line for a U+2585, which stands for unknown inside it.
_BORDERS = re.compile(r"[\r\n\t\0\u2585]+")
# In bytes; the trainer's own limit drops longer lines without a word.
_MAX_LINE_BYTES = 2**30


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """A vocabulary of `vocab_size` tokens, 3 special ones and the 256 bytes included.

    Raises:
      TokenizerError: the text has too few different words, or too many characters, for so many
        tokens.
    """
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_reason(str(error), vocab_size)) from None
    return SentencePieceTokenizer(written.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in _BORDERS.split(valid_unicode(text)) if line)


def _reason(message: str, vocab_size: int) -> str:
    if too_high := re.search(r"size too high .* value <= (\d+)", message):
        return (
            f"the text gives {too_high[1]} tokens, {vocab_size} were asked for;"
            " ask for fewer, or give more text"
        )
    if too_low := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"the characters of the text need {too_low[1]} tokens, {vocab_size} were asked for"
    if "sentences_.empty()" in message:
        return "there is no text to train on"
    return f"SentencePiece: {message.splitlines()[0]}"
