"""llama_jax: the Llama family and its training recipe in JAX, sharded for TPUs."""

__version__ = "0.1.0"
