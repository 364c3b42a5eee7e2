"""How tokens are drawn: wishes before the model's files, those before what Meta's code does."""

import pytest

from llama_jax.config.loading import ConfigError
from llama_jax.inference.sampling_choice import Wishes, choose_sampling, choose_stop_ids
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.chat import make_chat_format

TOLD = GenerationDefaults(temperature=0.3, top_k=7, repetition_penalty=1.1)


def chosen(defaults=GenerationDefaults(), **wishes):  # noqa: B008 (it is frozen)
    sampling = choose_sampling(
        Wishes(**wishes), defaults, stop_ids=frozenset({2}), max_new_tokens=9
    )
    assert (sampling.max_new_tokens, sampling.stop_ids) == (9, {2})
    return sampling


@pytest.mark.short
def test_where_nobody_says_anything_it_is_metas_way():
    sampling = chosen()
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, None)


def test_the_models_files_come_before_that_and_are_not_mixed_with_it():
    sampling = chosen(TOLD)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.3, 7, None)
    assert sampling.repetition_penalty == pytest.approx(1.1)


def test_what_is_asked_for_comes_first():
    sampling = chosen(TOLD, temperature=0.5, min_p=0.1, seed=3, stop_strings=("x",), logprobs=True)
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 7, 0.1)
    assert (sampling.seed, sampling.stop_strings, sampling.logprobs) == (3, ("x",), True)
    alone = chosen(temperature=1.5)
    assert (alone.temperature, alone.top_p) == (1.5, None)
    filtered = chosen(top_k=5)
    assert (filtered.temperature, filtered.top_k, filtered.top_p) == (0.6, 5, None)


def test_greedy_voids_what_the_files_say_about_drawing_but_not_what_is_asked_for():
    greedy = chosen(TOLD, temperature=0.0)
    assert (greedy.temperature, greedy.top_k) == (0.0, None)
    assert chosen(GenerationDefaults(temperature=0.0, top_p=0.9)).top_p is None
    with pytest.raises(ConfigError, match="top_k: has no effect at temperature 0"):
        chosen(TOLD, temperature=0.0, top_k=5)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 1.5}, {"top_k": 0}, {"min_p": -0.1}]
)
def test_a_value_out_of_range_is_an_error_that_names_it(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        chosen(**wrong)


def test_the_models_files_name_the_stops_and_a_chat_adds_its_own():
    byte = ByteTokenizer()
    special = byte.special
    told = GenerationDefaults(stop_ids=frozenset({65}))
    assert choose_stop_ids(byte, told, None) == {65}
    assert choose_stop_ids(byte, GenerationDefaults(), None) == {byte.eos_id}
    ends = {special[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")}
    assert choose_stop_ids(byte, told, make_chat_format(byte)) == {65, *ends}
