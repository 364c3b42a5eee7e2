"""Training a vocabulary on one part of a source and measuring it on the other."""

import dataclasses

from llama_jax.config.run import TextConfig, TrainedTokenizer
from llama_jax.data.corpus import Corpus, can_split, texts
from llama_jax.tokenizers import Tokenizer
from llama_jax.tokenizers.training import TRAINERS, bytes_per_token


@dataclasses.dataclass(frozen=True)
class VocabularyReport:
    """What was trained, and how well it compresses.

    Attributes:
      vocab_size: special tokens included.
      fingerprint: of the tokenizer.
      bytes_per_token: UTF-8 bytes a token, without begin and end tokens.
      measured_on: `held_out`, or `train` where the source has nothing to keep aside.
      files: how many of the source's files it was trained on.
    """

    vocab_size: int
    fingerprint: str
    bytes_per_token: float
    measured_on: str
    files: int


def train_vocabulary(
    source: TextConfig, wanted: TrainedTokenizer
) -> tuple[Tokenizer, VocabularyReport]:
    """Train on the part `train` of a source; whatever part it names is not looked at.

    Raises:
      ConfigError: no text at the source's path.
      TokenizerError: too little text for so many tokens.
    """
    parts = ("train", "held_out") if can_split(source) else ("all", "all")
    train, held_out = (dataclasses.replace(source, part=part) for part in parts)
    tokenizer = TRAINERS[wanted.model](texts(train), wanted.vocab_size)
    figure, measured_on = bytes_per_token(tokenizer, texts(held_out)), "held_out"
    if train == held_out or not figure:
        figure, measured_on = bytes_per_token(tokenizer, texts(train)), "train"
    report = VocabularyReport(
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        bytes_per_token=figure,
        measured_on=measured_on,
        files=len(Corpus(train).files),
    )
    return tokenizer, report
