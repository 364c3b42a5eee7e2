"""Orbax checkpoints of a run."""
