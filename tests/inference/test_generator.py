"""Generation against full forward passes, and when it ends."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
import toy_models
from flax import nnx
from toy_models import BYTE, CONFIG, PROMPTS, TIED, generator, greedy, make, saying

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig
from llama_jax.inference.generator import Generator, InferenceError
from llama_jax.inference.sampling import Sampling

GREEDY = Sampling(max_new_tokens=6, temperature=0.0, logprobs=True)
DRAWN = Sampling(max_new_tokens=6, temperature=1.5, top_p=0.95, top_k=50, seed=7)
EOT, EOM, EOS = (BYTE.special[name] for name in ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"))
STOPS = frozenset({EOT, EOM, EOS})


def ids_of(completions):
    return [[list(one.ids) for one in row] for row in completions]


@pytest.mark.short
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_greedy_is_the_argmax_of_full_forward_passes_for_unequal_prompts(config, stacked):
    wanted, logprobs = greedy(config, tuple(map(tuple, PROMPTS)), 6)
    rows = generator(config, stacked=stacked).generate(PROMPTS, GREEDY)
    assert ids_of(rows) == [[ids] for ids in wanted]
    for row, logps, prompt in zip(rows, logprobs, PROMPTS, strict=True):
        assert row[0].prompt_ids == tuple(prompt)
        assert (row[0].finish_reason, row[0].stop) == ("length", None)
        np.testing.assert_allclose(row[0].logprobs, logps, atol=2e-5)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_row_is_the_same_alone_in_a_batch_in_groups_and_after_longer_prompts(sampling):
    together = ids_of(generator(stacked=False).generate(PROMPTS, sampling))
    for number, prompt in enumerate(PROMPTS):
        alone = generator(stacked=False).generate([prompt], sampling)
        assert ids_of(alone) == [together[number]]
    swapped = ids_of(generator(stacked=False).generate(PROMPTS[::-1], sampling))
    assert swapped == together[::-1]
    in_groups = generator(stacked=False, batch_size=3)
    assert ids_of(in_groups.generate(PROMPTS, sampling)) == together


def test_samples_differ_reproduce_and_are_numbered_whatever_their_batch():
    many = ids_of(generator(stacked=False).generate(PROMPTS[:2], DRAWN, n=4))
    assert many == ids_of(generator(stacked=False).generate(PROMPTS[:2], DRAWN, n=4))
    for row in many:
        assert len({tuple(ids) for ids in row}) == 4
    # The first two of four are the two of two, and groups of three rows cut prompts apart.
    assert [row[:2] for row in many] == ids_of(
        generator(stacked=False).generate(PROMPTS[:2], DRAWN, n=2)
    )
    assert many == ids_of(generator(stacked=False, batch_size=3).generate(PROMPTS[:2], DRAWN, n=4))
    other = dataclasses.replace(DRAWN, seed=8)
    assert many != ids_of(generator(stacked=False).generate(PROMPTS[:2], other, n=4))


def test_longer_completions_begin_as_shorter_ones_across_dispatches_and_cache_buckets():
    longer = dataclasses.replace(DRAWN, max_new_tokens=100)
    short = ids_of(generator(stacked=False).generate(PROMPTS, DRAWN))
    long = ids_of(generator(stacked=False).generate(PROMPTS, longer))
    assert [len(row[0]) for row in long] == [100] * 4
    assert [[row[0][:6]] for row in long] == short


MESHES = {
    "data 8": MeshConfig(data=8, fsdp=1),
    "fsdp 8": MeshConfig(fsdp=8),
    "tensor 8, over the 2 kv heads": MeshConfig(fsdp=1, tensor=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", MESHES)
def test_results_are_those_of_one_device_on_every_mesh(name, stacked):
    # Three prompts, which no batch axis divides: the rest are rows without a prompt.
    wanted, _ = greedy(CONFIG, tuple(map(tuple, PROMPTS)), 6)
    sharded = generator(CONFIG, MESHES[name], 8, stacked=stacked)
    assert ids_of(sharded.generate(PROMPTS[:3], GREEDY)) == [[ids] for ids in wanted[:3]]
    if not stacked:
        drawn = ids_of(generator(stacked=False).generate(PROMPTS[:3], DRAWN, n=2))
        assert ids_of(sharded.generate(PROMPTS[:3], DRAWN, n=2)) == drawn


def test_penalties_and_min_p_work_on_a_mesh():
    sampling = dataclasses.replace(
        DRAWN, repetition_penalty=1.3, presence_penalty=0.7, min_p=0.01, logprobs=True
    )
    alone = generator(stacked=False).generate(PROMPTS[:3], sampling)
    sharded = generator(CONFIG, MESHES["all"], 8, stacked=False).generate(PROMPTS[:3], sampling)
    assert ids_of(sharded) == ids_of(alone)
    np.testing.assert_allclose(sharded[1][0].logprobs, alone[1][0].logprobs, atol=2e-5)


def test_a_context_axis_is_refused():
    with pytest.raises(ConfigError, match=r"mesh.context: .* must be 1, not 2"):
        generator(CONFIG, MeshConfig(fsdp=4, context=2), 8)


@pytest.mark.short
def test_a_stop_id_straight_from_the_prompt_leaves_no_token():
    always = saying(lambda token: EOT)
    done = always.generate([[65], [66, 67]], Sampling(5, temperature=0.0, stop_ids=STOPS))
    for row in done:
        assert (row[0].ids, row[0].text) == ((), "")
        assert (row[0].finish_reason, row[0].stop) == ("stop", EOT)


@pytest.mark.short
def test_without_a_stop_id_there_are_exactly_so_many_tokens():
    never = saying(lambda token: 65)
    done = never.generate([[66]], Sampling(5, temperature=0.0, stop_ids=STOPS))[0][0]
    assert (done.ids, done.text, done.finish_reason, done.stop) == (
        (65,) * 5,
        "AAAAA",
        "length",
        None,
    )


def test_rows_stop_independently_and_each_tells_which_id_it_was():
    # a b c <eot>, k <eom>, z z z ...
    chain = {97: 98, 98: 99, 99: EOT, 107: EOM, 122: 122}
    model = saying(lambda token: chain.get(token, 122))
    sampling = Sampling(20, temperature=0.0, stop_ids=STOPS, logprobs=True)
    first, second, third = (row[0] for row in model.generate([[97], [107], [122]], sampling))
    assert (first.text, first.stop, len(first.logprobs)) == ("bc", EOT, 2)
    assert (second.text, second.stop, second.finish_reason) == ("", EOM, "stop")
    assert (third.text, third.stop, third.finish_reason) == ("z" * 20, None, "length")


def test_a_stop_string_across_tokens_cuts_the_text_and_drops_later_ids():
    alphabet = saying(lambda token: token + 1)
    sampling = Sampling(20, temperature=0.0, stop_strings=("xyz", "fgh"), logprobs=True)
    done = alphabet.generate([[97], [110]], sampling)
    assert (done[0][0].text, done[0][0].stop, done[0][0].finish_reason) == ("bcde", "fgh", "stop")
    assert done[0][0].ids == tuple(b"bcdefgh")
    assert len(done[0][0].logprobs) == 7
    assert (done[1][0].text, done[1][0].stop) == ("opqrstuvw", "xyz")


def test_what_could_have_begun_a_stop_string_is_given_at_the_end():
    done = saying(lambda token: token + 1).generate(
        [[97]], Sampling(3, temperature=0.0, stop_strings=("cde",))
    )
    assert (done[0][0].text, done[0][0].finish_reason) == ("bcd", "length")


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_stream_is_the_completion_in_pieces(sampling):
    wanted = generator(stacked=False).generate([PROMPTS[1]], sampling)[0][0]
    pieces = list(generator(stacked=False).stream(PROMPTS[1], sampling))
    assert [piece.completion for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    last = pieces[-1].completion
    assert dataclasses.replace(last, logprobs=None) == dataclasses.replace(wanted, logprobs=None)
    assert "".join(piece.text for piece in pieces) == wanted.text
    assert tuple(i for piece in pieces for i in piece.ids) == wanted.ids


def test_a_stream_gives_characters_whole_and_as_soon_as_they_are():
    # U+1F60A is F0 9F 98 8A; then "!" for ever.
    chain = {65: 0xF0, 0xF0: 0x9F, 0x9F: 0x98, 0x98: 0x8A, 0x8A: 33, 33: 33}
    model = saying(lambda token: chain.get(token, 65))
    pieces = list(model.stream([65], Sampling(6, temperature=0.0)))
    assert [piece.text for piece in pieces] == ["\U0001f60a", "!", "!"]
    assert [len(piece.ids) for piece in pieces] == [4, 1, 1]
    # Ended inside the character: what there was of it shows once.
    cut = model.generate([[65]], Sampling(3, temperature=0.0))[0][0]
    assert cut.text == "\ufffd"


def test_a_stream_can_be_left_and_the_generator_used_again():
    model = saying(lambda token: token + 1)
    stream = model.stream([97], Sampling(20, temperature=0.0))
    assert next(stream).text == "b"
    stream.close()
    assert model.generate([[97]], Sampling(2, temperature=0.0))[0][0].text == "bc"


WRONG = {
    "too long": ([[1] * 120], Sampling(20), {}, r"max_new_tokens: prompt 0 has 120 .* 140; .* 128"),
    "empty": ([[1], []], Sampling(2), {}, r"prompt 1 has no tokens"),
    "token": ([[1, 272]], Sampling(2), {}, r"prompt 0: token id 272 .* vocabulary of 272"),
    "stop id": (
        [[1]],
        Sampling(2, stop_ids=frozenset({272})),
        {},
        r"stop_ids: 272 is outside .* 272",
    ),
    "n": ([[1]], Sampling(2), {"n": 0}, r"n: 0 samples"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_the_model_cannot_have_is_refused_with_the_numbers(case):
    prompts, sampling, options, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        generator(stacked=False).generate(prompts, sampling, **options)


def test_the_whole_context_can_be_used():
    sampling = Sampling(28, temperature=0.0)
    done = generator(stacked=False).generate([list(range(100))], sampling)[0][0]
    model, mesh = make()
    text = np.array([[*range(100), *done.ids]])
    assert text.shape == (1, 128)
    logits_TV = toy_models.full_logits(model, mesh, text)[0]
    assert list(done.ids) == logits_TV[99:-1].argmax(-1).tolist()


def test_broken_weights_are_an_error_and_no_text():
    model, mesh = make()
    head = np.array(model.lm_head[...])
    head[0, 0] = np.nan
    model.lm_head.set_value(jax.device_put(head, model.lm_head[...].sharding))
    with pytest.raises(InferenceError, match=r"logits after 3 tokens hold NaN"):
        Generator(model, BYTE, mesh).generate([[5, 6, 7]], Sampling(2, temperature=0.0))


def test_running_past_the_end_of_the_cache_is_an_error():
    engine = generator(stacked=False)._engine
    cache = engine.prefill([[1, 2, 3]], 1, (16,), 20)
    decoding = engine.begin(cache, [[1, 2, 3]], [0], Sampling(9), vocab_size=272, filled=16)
    decoding.step(3, np.zeros(1, bool))
    with pytest.raises(
        InferenceError, match=r"2 more tokens, but the cache has 1 free places of 20"
    ):
        decoding.step(2, np.zeros(1, bool))


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn():
    wide = dataclasses.replace(CONFIG, vocab_size=320)
    model, mesh = make(wide)
    head = np.array(model.lm_head[...])
    head[:, 272:] *= 20  # padding that would win nearly always
    model.lm_head.set_value(jax.device_put(head, model.lm_head[...].sharding))
    done = Generator(model, BYTE, mesh).generate([[1], [2]], Sampling(20, seed=1))
    assert max(i for row in done for i in row[0].ids) < 272


class Compilations(logging.Handler):
    """Names of the programs that JAX compiles meanwhile."""

    def __enter__(self):
        self.names = []
        self.logger = logging.getLogger("jax._src.interpreters.pxla")
        self.logger.addHandler(self)
        jax.config.update("jax_log_compiles", True)
        return self

    def __exit__(self, *error):
        jax.config.update("jax_log_compiles", False)
        self.logger.removeHandler(self)

    def emit(self, record):
        message = record.getMessage()
        if message.startswith("Compiling "):
            self.names.append(message.split()[1])


def test_six_lengths_compile_three_prefills_and_one_decode_step():
    model, mesh = make()
    fresh = Generator(model, BYTE, mesh)
    fresh_names = []
    with Compilations() as compilations:
        for length in (5, 9, 17, 33, 40):
            fresh.generate([list(range(length))], dataclasses.replace(GREEDY, max_new_tokens=12))
        fresh_names = list(compilations.names)
    assert len(fresh_names) <= 4, fresh_names
    with Compilations() as compilations:
        # Another seed, temperature, stop set or length within the buckets: nothing new.
        fresh.generate([[1, 2, 3]], Sampling(3, temperature=0.0, seed=4, logprobs=True))
        fresh.generate([[1] * 30], Sampling(20, temperature=0.0, stop_ids=STOPS, logprobs=True))
    assert compilations.names == []


@pytest.mark.parametrize("chunk", [16, 32])
def test_chunked_prefill_is_one_pass(chunk, monkeypatch):
    prompt = list(np.random.default_rng(0).integers(0, 272, 100))
    wanted = generator(stacked=False).generate([prompt, prompt[:50]], GREEDY)
    monkeypatch.setattr("llama_jax.inference.buckets.LONGEST_CHUNK", chunk)
    got = generator(stacked=False).generate([prompt, prompt[:50]], GREEDY)
    assert ids_of(got) == ids_of(wanted)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one[0].logprobs, other[0].logprobs, atol=2e-5)


@pytest.mark.slow
def test_a_context_of_32k_in_chunks_goes_on_as_one_forward_pass():
    config = dataclasses.replace(CONFIG, max_seq_len=32768, num_layers=1, num_heads=2, init_std=0.1)
    model, mesh = make(config)
    prompt = np.random.default_rng(0).integers(0, 272, 32768 - 3)
    done = Generator(model, BYTE, mesh).generate(
        [prompt.tolist()], dataclasses.replace(GREEDY, max_new_tokens=3)
    )[0][0]
    blockwise = dataclasses.replace(toy_models.F32, attention="blockwise")
    model, mesh = make(config, execution=blockwise)
    logits_TV = toy_models.full_logits(model, mesh, np.array([[*prompt, *done.ids]]))[0]
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV[-4:-1]))
    assert list(done.ids) == logits_TV[-4:-1].argmax(-1).tolist()
    np.testing.assert_allclose(done.logprobs, logprobs_TV[[0, 1, 2], list(done.ids)], atol=2e-5)


def test_parameters_are_shared_or_cast_once():
    bf16 = dataclasses.replace(toy_models.F32, compute_dtype="bfloat16")
    model, mesh = make(execution=bf16)
    engine = Generator(model, BYTE, mesh)._engine
    assert {leaf.dtype.name for leaf in engine._params} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"float32"}
    done = Generator(model, BYTE, mesh).generate([PROMPTS[1]], GREEDY)[0][0]
    assert len(done.ids) == 6
