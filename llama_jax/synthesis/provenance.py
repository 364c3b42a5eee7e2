"""Which model made something: where it lies, and a fingerprint that tells it from others."""

from typing import Any

from llama_jax.interchange.fingerprints import model_fingerprint
from llama_jax.interchange.source import Source


def describe_model(source: Source) -> dict[str, Any]:
    """Path, format and fingerprint, as records hold them."""
    return {
        "path": str(source.path),
        "format": source.format,
        "fingerprint": model_fingerprint(source),
    }
