"""Chat references, and tokenizers that chat formats are tried on."""

import io
import json

import pytest

from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer


@pytest.fixture(scope="session")
def chat_reference(shared):
    return json.loads((shared / "reference" / "llama3_chat.json").read_text())


@pytest.fixture(scope="session")
def byte():
    return ByteTokenizer()


@pytest.fixture(scope="session")
def sentencepiece_proto(training_texts):
    """A small vocabulary of Llama 2's kind: byte fallback, no normalisation, a leading space."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    texts = [line for text in training_texts for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *["[INST] <<SYS>> <</SYS>> [/INST] <|user|>"] * 9]),
        model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_proto):
    return SentencePieceTokenizer(sentencepiece_proto)
