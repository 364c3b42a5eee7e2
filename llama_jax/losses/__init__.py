"""Losses of arrays: no model, no batch, no config."""
