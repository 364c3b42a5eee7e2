"""A run small enough that the TPU compiler takes seconds. No tests here."""

from llama_jax.config.files import load_run_config

TINY = load_run_config(
    "tiny",
    [
        "model.vocab_size=512",
        "model.embed_dim=128",
        "model.head_dim=128",
        "model.num_heads=2",
        "model.num_kv_heads=1",
        "model.mlp_dim=256",
        "model.rope={theta=10000.0}",
        "data.seq_len=128",
        "data.batch_size=8",
        "execution.attention=reference",
        "execution.compute_dtype=bfloat16",
    ],
)
