"""A real model out of its GGUF file, against logits that transformers has given."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from in_memory import assert_bit_equal

from llama_jax.config.files import load_model_config
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.checking import check_source
from llama_jax.interchange.gguf import open_gguf
from llama_jax.interchange.gguf_writing import write_gguf
from llama_jax.interchange.hugging_face import open_hugging_face
from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.meta import open_meta
from llama_jax.interchange.meta_writing import write_meta
from llama_jax.sharding.mesh import make_mesh

# Of logits on dequantised weights, in float32.
TOLERANCE = 2e-3
PROMPTS = ("english", "code", "multilingual", "chat", "long", "single")


class Runner:
    """The model on one device, compiled once a length."""

    def __init__(self, source):
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        model = load_model(source, ExecutionConfig(compute_dtype="float32"), self.mesh)
        graphdef, self.params = nnx.split(model)

        @jax.jit
        def run(params, tokens_BT, positions_BT, segments_BT):
            model = nnx.merge(graphdef, params)
            return model(tokens_BT, positions_BT=positions_BT, segment_ids_BT=segments_BT)

        self._run = run

    def logits(self, ids):
        """float32 [T, V]."""
        ids_BT = np.asarray(ids, np.int32)[None]
        places_BT = np.arange(len(ids), dtype=np.int32)[None]
        with jax.default_matmul_precision("highest"), jax.set_mesh(self.mesh):
            return np.asarray(self._run(self.params, ids_BT, places_BT, np.ones_like(ids_BT)))[0]


@pytest.fixture(scope="module")
def reference(shared):
    return np.load(shared / "reference" / "smollm2" / "reference.npz")


@pytest.fixture(scope="module")
def source(smollm2_gguf):
    return open_gguf(smollm2_gguf)


@pytest.fixture(scope="module")
def runner(source):
    return Runner(source)


def check_prompt(runner, reference, prompt):
    """Logits at every position, then the greedy ones, given the ones before them."""
    ids, greedy = reference[f"{prompt}.ids"], reference[f"{prompt}.greedy"]
    logits_TV = runner.logits(np.concatenate([ids, greedy[:-1]]))
    of_prompt_TV = logits_TV[: len(ids)]
    top = np.take_along_axis(of_prompt_TV, reference[f"{prompt}.top_ids"], -1)
    np.testing.assert_allclose(top, reference[f"{prompt}.top_logits"], atol=TOLERANCE, rtol=0)
    sums = np.logaddexp.reduce(of_prompt_TV.astype(np.float64), -1)
    np.testing.assert_allclose(sums, reference[f"{prompt}.logsumexp"], atol=TOLERANCE, rtol=0)
    # No gap between the best two is near the tolerance.
    assert reference[f"{prompt}.greedy_gap"].min() > 2 * TOLERANCE
    np.testing.assert_array_equal(logits_TV[len(ids) - 1 :].argmax(-1), greedy)


def test_its_metadata_is_the_shipped_config(source):
    wanted = dataclasses.replace(load_model_config("smollm2-135m"), init_std=0.02)
    assert source.config == wanted
    assert source.generation.stop_ids == {2}
    assert "im_start" in source.chat_template
    assert {tensor.kind for tensor in source.tensors.values()} == {"Q4_1", "Q8_0", "F32"}


@pytest.mark.parametrize("prompt", ["english", "single"])
def test_logits_and_greedy_tokens_are_the_references(runner, reference, prompt):
    check_prompt(runner, reference, prompt)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [p for p in PROMPTS if p not in ("english", "single")])
def test_logits_and_greedy_tokens_of_longer_prompts(runner, reference, prompt):
    check_prompt(runner, reference, prompt)


@pytest.mark.slow
def test_gguf_to_hugging_face_to_meta_to_gguf_keeps_every_bit(source, reference, tmp_path):
    pytest.importorskip("torch")
    tokenizer = source.load_tokenizer()
    write_hugging_face(source, tmp_path / "hf", tokenizer=tokenizer)
    write_meta(open_hugging_face(tmp_path / "hf"), tmp_path / "meta", tokenizer=tokenizer)
    write_gguf(open_meta(tmp_path / "meta"), tmp_path / "last.gguf")
    last = open_gguf(tmp_path / "last.gguf")
    check_source(last)
    assert_bit_equal(source, last)
    assert last.config == source.config
    assert last.chat_template == source.chat_template
    assert last.generation == source.generation
    for text in ("Hello world 123", "  é\n\n你好 <|im_end|>"):
        assert last.load_tokenizer().encode(text) == tokenizer.encode(text)
    check_prompt(Runner(last), reference, "english")
