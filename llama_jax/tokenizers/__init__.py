"""Text to token ids and back: the Llama 3 tokenizer, bytes, and training new vocabularies."""

from llama_jax.tokenizers.loading import load_tokenizer
from llama_jax.tokenizers.streaming import StreamDecoder
from llama_jax.tokenizers.tokenizer import Tokenizer, TokenizerError

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerError", "load_tokenizer"]
