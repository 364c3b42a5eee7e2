"""Chat references, and tokenizers that chat formats are tried on."""

import json
import sys
from pathlib import Path

import pytest

from llama_jax.tokenizers.byte import ByteTokenizer

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def chat_reference(shared):
    return json.loads((shared / "reference" / "llama3_chat.json").read_text())


@pytest.fixture(scope="session")
def byte():
    return ByteTokenizer()
