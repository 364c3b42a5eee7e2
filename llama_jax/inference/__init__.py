"""Generating text: sampling, prefill and decoding over a key-value cache."""
