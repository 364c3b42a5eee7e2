"""Attention backends. See `llama_jax.kernels.attention` for their table."""
