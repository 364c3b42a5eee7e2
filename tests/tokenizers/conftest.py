"""The real Llama 3 vocabulary, where it is installed, and small ones trained once."""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from llama_jax.interchange.gguf import open_gguf
from llama_jax.tokenizers import load_tokenizer
from llama_jax.tokenizers.sentencepiece_training import train_sentencepiece
from llama_jax.tokenizers.training import train_tokenizer


def llama3_model():
    """`tokenizer.model` from LLAMA3_TOKENIZER or from an installed `llama-models`, or None."""
    if path := os.environ.get("LLAMA3_TOKENIZER"):
        return Path(path)
    try:
        files = importlib.metadata.files("llama-models") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [file for file in files if file.as_posix() == "llama_models/llama3/tokenizer.model"]
    return Path(str(found[0].locate())) if found else None


@pytest.fixture(scope="session")
def llama3():
    model = llama3_model()
    if model is None:
        pytest.skip("no Llama 3 vocabulary: install llama-models or set LLAMA3_TOKENIZER")
    return load_tokenizer(model)


@pytest.fixture(scope="session")
def reference(shared):
    return json.loads((shared / "reference" / "llama3_tokenizer.json").read_text())


@pytest.fixture(scope="session")
def training_texts():
    return [
        "def add(a, b):\n    return a + b  # the sum of a and b\n" * 3,
        "It's what they're saying: we'll see, don't you'd think? 1234567890 12,345.67\n\n",
        "Việt Nam, héllo wörld, Привет мир, 你好世界, العربية, हिन्दी, 🙂🙂👩‍👩‍👧\r\n\r\n",
        "aaaaaaaaaaaaaaaa abababababab aabaabaab abcabcabc ==== ---- //// \t\t\t    \n",
        "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX.\n" * 2,
    ] * 4


@pytest.fixture(scope="session")
def trained(training_texts):
    return train_tokenizer(training_texts, 480)


@pytest.fixture(scope="session")
def spm(training_texts):
    """A small SentencePiece vocabulary with Llama 2's settings."""
    return train_sentencepiece(training_texts, 420)


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    """SmolLM2's vocabulary out of its GGUF file."""
    # `load_tokenizer` gives the same, but by the gguf package's reader, which takes seconds.
    return open_gguf(smollm2_gguf).load_tokenizer()


@pytest.fixture(scope="session")
def smollm2_cases(shared):
    path = shared / "reference" / "smollm2" / "tokenizer_cases.json"
    cases = json.loads(path.read_text())
    assert len(cases) == 210
    return cases
