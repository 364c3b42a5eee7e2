"""What a stage minimises. See `llama_jax.objectives.objective` for the table."""
