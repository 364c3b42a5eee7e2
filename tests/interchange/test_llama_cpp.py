"""Files that we write, run by llama.cpp: it loads them, and continues as our network does."""

import ctypes
import dataclasses

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from in_memory import CONFIG, logits, random_source
from test_smollm2_gguf import Runner

from llama_jax.config.model import LinearScaling, RopeConfig, YarnScaling
from llama_jax.interchange.gguf import open_gguf
from llama_jax.interchange.gguf_writing import write_gguf

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow

TEXTS = ("Hello world!", "  two  spaces\n\nand 12345 digits", "Il était une fois; 你好, мир 🙂")
PROMPT = "The capital of France is"
# Rope scaling of each kind, biases, heads wider than D / N: what llama.cpp has to find in a file.
TINY = {
    "llama3": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_embeddings=True),
    "biased, linear": dataclasses.replace(
        CONFIG, attention_bias=True, mlp_bias=True, rope=RopeConfig(1e4, LinearScaling(factor=2.0))
    ),
    "wide heads": dataclasses.replace(CONFIG, head_dim=16, rope=RopeConfig(1e4)),
    "yarn": dataclasses.replace(CONFIG, rope=RopeConfig(1e4, YarnScaling(4.0, 16))),
    "yarn, own temperature": dataclasses.replace(
        CONFIG, rope=RopeConfig(1e4, YarnScaling(4.0, 16, beta_fast=4.0, attention_factor=1.5))
    ),
}


def load(file, **options):
    usual = {"n_ctx": 64, "n_threads": 2, "verbose": False, "logits_all": True, "seed": 0}
    return llama_cpp.Llama(str(file), **(usual | options))


def their_logits(llama, ids):
    llama.reset()
    llama.eval(list(map(int, ids)))
    return np.array(llama.scores[: len(ids)], np.float32)


def their_greedy(llama, ids, count):
    llama.reset()
    llama.eval(ids)
    found = []
    for _ in range(count):
        found.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(found[-1:])
    return found


@pytest.mark.parametrize("model", TINY)
def test_a_tiny_model_has_our_logits_in_llama_cpp(tmp_path, model):
    source = random_source(TINY[model])
    write_gguf(source, tmp_path / "x.gguf")
    ids = np.random.default_rng(2).integers(0, 272, 48)
    theirs_TV, ours_TV = their_logits(load(tmp_path / "x.gguf"), ids), logits(source, ids)
    assert np.abs(ours_TV).max() > 1
    # Its cache of keys and values is float16, its attention rounds to it.
    np.testing.assert_allclose(theirs_TV, ours_TV, atol=2e-2)
    assert np.abs(theirs_TV - ours_TV).mean() < 2e-3


def test_q8_0_is_what_llama_cpp_itself_makes_of_the_same_weights(tmp_path):
    source = random_source()
    write_gguf(source, tmp_path / "f32.gguf")
    write_gguf(source, tmp_path / "q8.gguf", dtype="q8_0")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "q8.gguf"
    failed = llama_cpp.llama_model_quantize(
        str(tmp_path / "f32.gguf").encode(), str(theirs).encode(), ctypes.byref(options)
    )
    assert not failed
    theirs, ours = ({t.name: t for t in gguf.GGUFReader(f).tensors} for f in (theirs, ours))
    assert theirs.keys() == ours.keys()
    assert [t.tensor_type for t in ours.values()].count(Kind.Q8_0) == 16
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type
        np.testing.assert_array_equal(tensor.data, theirs[name].data)


@pytest.fixture(scope="module", params=["float32", "q8_0"])
def rewritten(request, smollm2_gguf, tmp_path_factory):
    file = tmp_path_factory.mktemp("llama_cpp") / f"{request.param}.gguf"
    write_gguf(open_gguf(smollm2_gguf), file, dtype=request.param)
    return file


def test_smollm2_written_by_us_has_its_tokenizer_and_template_in_llama_cpp(rewritten):
    llama, ours = load(rewritten), open_gguf(rewritten)
    tokenizer = ours.load_tokenizer()
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text)
    assert llama.token_eos() == 2
    assert llama.metadata["tokenizer.chat_template"] == ours.chat_template
    if rewritten.stem == "float32":
        answer = llama.create_chat_completion(
            [{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=16,
            temperature=0.0,
        )["choices"][0]
        assert answer["message"]["content"] == "The capital of France is Paris."
        assert answer["finish_reason"] == "stop"


def test_smollm2_written_by_us_continues_in_llama_cpp_as_ours_does(rewritten):
    source = open_gguf(rewritten)
    ids = source.load_tokenizer().encode(PROMPT)
    theirs = their_greedy(load(rewritten), ids, 24)
    ours_TV = Runner(source).logits(ids + theirs[:-1])[len(ids) - 1 :]
    if rewritten.stem == "float32":
        np.testing.assert_array_equal(ours_TV.argmax(-1), theirs)
    # With Q8_0 weights llama.cpp rounds activations to eight bits too, so a near tie may turn.
    short_of_best = (
        ours_TV.max(-1) - np.take_along_axis(ours_TV, np.array(theirs)[:, None], -1)[:, 0]
    )
    assert short_of_best.max() < 1.0
    assert (short_of_best == 0).mean() > 0.8
