"""Vocabularies that we write into GGUF files give the same ids in llama.cpp."""

import random

import gguf
import pytest

from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.gguf_vocabulary import to_gguf_fields

LETTERS = "abthe ou  wis\n\t1234éß你🙂.,!'s"


@pytest.fixture(scope="module", params=["tiktoken", "sentencepiece", "byte", "smollm2", "llama3"])
def pair(request, tmp_path_factory):
    """A tokenizer, and llama.cpp with its vocabulary."""
    llama_cpp = pytest.importorskip("llama_cpp")
    fixtures = {"tiktoken": "trained", "sentencepiece": "spm"}
    if request.param == "byte":
        ours = ByteTokenizer()
    else:
        ours = request.getfixturevalue(fixtures.get(request.param, request.param))
    path = tmp_path_factory.mktemp(request.param) / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in to_gguf_fields(ours).items():
        kinds = {bool: writer.add_bool, str: writer.add_string, list: writer.add_array}
        kinds.get(type(value), writer.add_uint32)(name, value)
    for name in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"llama.{name}", 32)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    yield ours, theirs
    theirs.close()


def texts():
    rng = random.Random(0)
    yield from [
        "",
        " ",
        "  a",
        "a\n\n b",
        "I'm WE'LL don't",
        "1234567",
        " Việt",
        "你好世界",
        "\u3000x",
    ]
    for _ in range(2_000):
        yield "".join(rng.choices(LETTERS, k=rng.randint(1, 30)))


@pytest.mark.slow
def test_llama_cpp_gives_the_same_ids(pair):
    ours, theirs = pair
    for text in texts():
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == ours.encode(text), text


@pytest.mark.slow
def test_llama_cpp_finds_special_tokens_and_begins_prompts_as_we_do(pair):
    ours, theirs = pair
    name = next(name for name, i in ours.special.items() if i == ours.eos_id)
    for text in ["a", f"a{name}", f"{name} b{name}"]:
        ids = theirs.tokenize(text.encode(), add_bos=True, special=True)
        assert ids == ours.encode(text, bos=ours.adds_bos, allowed_special={name})
        plain = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert plain == ours.encode(text)
    assert (theirs.token_bos(), theirs.token_eos()) == (ours.bos_id, ours.eos_id)
