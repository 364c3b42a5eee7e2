"""Configuration: TOML files loaded strictly into frozen dataclasses."""
