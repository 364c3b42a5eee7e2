"""Documents to ids, many at a time; each becomes begin token, ids, end token.

SentencePiece vocabularies are run by tensorflow-text in worker processes, which gives the ids of
`sentencepiece` for a batch in one call. TensorFlow is imported there and nowhere else: it would
reach for the accelerator that JAX holds, and takes seconds and hundreds of megabytes.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.tokenizers import Tokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from llama_jax.tokenizers.tokenizer import valid_unicode

EncodeDocuments = Callable[[Sequence[str]], list[list[int]]]

_BATCH = 256


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, in this process."""
    return [tokenizer.encode(text, bos=True, eos=True) for text in texts]


def worker_encoder(tokenizer: Tokenizer) -> EncodeDocuments:
    """How a worker process encodes documents; the ids are those of `encode_documents`."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return TensorFlowText(tokenizer).encode_documents
    return lambda texts: encode_documents(tokenizer, texts)


class TensorFlowText:
    """A SentencePiece vocabulary in tensorflow-text. Imports TensorFlow, without accelerators."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._ends = tokenizer.bos_id, tokenizer.eos_id
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        # Both write to the terminal while they load, whatever their log levels are.
        with _without_stderr():
            import tensorflow as tf
            import tensorflow_text

            # The processes are the parallelism.
            tf.config.threading.set_intra_op_parallelism_threads(1)
            self._tokenizer = tensorflow_text.SentencepieceTokenizer(model=tokenizer.encoding_proto)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, with begin and end tokens."""
        bos_id, eos_id = self._ends
        documents = []
        for start in range(0, len(texts), _BATCH):
            batch = [valid_unicode(text).encode() for text in texts[start : start + _BATCH]]
            ids: Any = self._tokenizer.tokenize(batch)
            documents += [[bos_id, *document, eos_id] for document in ids.to_list()]
        return documents


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
