import dataclasses

import numpy as np
import pytest
from in_memory import CONFIG

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import LinearScaling, RopeConfig, YarnScaling
from llama_jax.interchange import gguf_metadata
from llama_jax.interchange.generation_defaults import GenerationDefaults

ROPES = {
    "plain": RopeConfig(500000.0),
    "linear": RopeConfig(10000.0, LinearScaling(factor=2.5)),
    "yarn": RopeConfig(1e6, YarnScaling(4.0, 32768)),
    "yarn, all said": RopeConfig(1e6, YarnScaling(4.0, 32768, "yarn", 16.0, 2.0, 1.25)),
    "llama3": CONFIG.rope,
}


def in_float32(fields):
    """As a file gives numbers back; ours in float64 excepted."""
    return {
        key: float(np.float32(value))
        if type(value) is float and not key.startswith(gguf_metadata.LLAMA3)
        else value
        for key, value in fields.items()
    }


def fields_of(config, **changes):
    fields = {"general.architecture": "llama", **gguf_metadata.fields_from_config(config)}
    fields = in_float32(fields) | changes
    return {key: value for key, value in fields.items() if value is not None}


def read(fields, **given):
    usual = {"vocab_size": 288, "llama3": None, "tie_embeddings": False}
    usual |= {"attention_bias": False, "mlp_bias": False}
    return gguf_metadata.config_from_fields(fields, "x.gguf", **(usual | given))


@pytest.mark.parametrize("rope", ROPES)
def test_a_config_comes_back_equal_through_float32(rope):
    config = dataclasses.replace(CONFIG, rope=ROPES[rope], norm_eps=1e-6)
    fields = fields_of(config)
    assert read(fields, llama3=gguf_metadata.stated_llama3(fields)) == config


def test_what_files_may_leave_out_is_as_in_llama_cpp():
    fields = fields_of(
        dataclasses.replace(CONFIG, rope=RopeConfig(10000.0), num_kv_heads=8),
        **dict.fromkeys(
            ("llama.attention.head_count_kv", "llama.vocab_size", "llama.rope.freq_base",
             "llama.rope.dimension_count", "llama.attention.key_length",
             "llama.attention.value_length")
        ),
    )  # fmt: skip
    config = read(fields, vocab_size=290)
    assert (config.num_kv_heads, config.vocab_size, config.head_dim) == (8, 290, 8)
    assert config.rope == RopeConfig(10000.0)


def test_a_factor_without_a_kind_is_linear_by_either_name():
    for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
        fields = fields_of(dataclasses.replace(CONFIG, rope=RopeConfig(10000.0)), **{key: 4.0})
        assert read(fields).rope.scaling == LinearScaling(factor=4.0)


def test_the_same_number_for_every_layer_is_one_number():
    fields = fields_of(CONFIG, **{"llama.attention.head_count_kv": [2, 2]})
    assert read(fields).num_kv_heads == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture: 'qwen2' is not supported"),
        ({"general.architecture": None}, "general.architecture: 'None' is not supported"),
        ({"llama.embedding_length": None}, "llama.embedding_length: missing key"),
        ({"llama.block_count": 2.0}, "llama.block_count: expected a whole number, got 2.0"),
        ({"llama.feed_forward_length": [96, 64]}, "llama.feed_forward_length: differs from layer"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "epsilon: expected a number"),
        ({"llama.attention.key_length": 16}, "key_length: the width of a head has to be one"),
        ({"llama.attention.head_count_kv": 3}, "head_count_kv: 3 does not divide num_heads, 8"),
        ({"llama.expert_count": 8}, "llama.expert_count: 8: this changes the network"),
        ({"llama.final_logit_softcapping": 30.0}, "softcapping: 30.0: this changes the network"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window: 4096: this changes"),
        ({"llama.rope.scaling.type": "longrope"}, "scaling.type: 'longrope' is not supported"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor: only supported with yarn"),
    ],
)
def test_what_is_wrong_is_told_by_key(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(fields_of(dataclasses.replace(CONFIG, rope=RopeConfig(10000.0)), **changes))
    assert str(error.value).startswith("x.gguf: ")


def test_two_kinds_of_scaling_at_once_are_refused():
    fields = fields_of(dataclasses.replace(CONFIG, rope=ROPES["yarn"]))
    with pytest.raises(ConfigError, match="'yarn' together with divisors"):
        read(fields, llama3=CONFIG.rope.scaling)


@pytest.mark.parametrize(
    "ids",
    [{4}, {4, 7}, {4, 6, 7}, {7}, {4, 1, 7}, {1, 2, 3, 4, 6, 7}, set()],
)
def test_any_set_of_stop_ids_comes_back(ids):
    texts = ["a", "b", "c", "d", "<|end_of_text|>", "e", "<|eom_id|>", "<|eot_id|>"]
    vocabulary = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.eos_token_id": 4}
    defaults = GenerationDefaults(stop_ids=frozenset(ids), bos_id=3, pad_id=5)
    fields = vocabulary | gguf_metadata.token_fields(defaults, vocabulary)
    read_back = gguf_metadata.generation_from_fields(fields)
    # A file with an end of text can't say that nothing stops.
    assert read_back.stop_ids == (ids or {4})
    assert (read_back.bos_id, read_back.pad_id) == (3, 5)


def test_ends_of_turn_and_message_are_said_by_llama_cpps_keys():
    texts = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    vocabulary = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.eos_token_id": 0}
    defaults = GenerationDefaults(stop_ids=frozenset({0, 1, 2}))
    assert gguf_metadata.token_fields(defaults, vocabulary) == {
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.eom_token_id": 1,
    }


def test_sampling_defaults_come_back():
    defaults = GenerationDefaults(
        temperature=0.6, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1
    )
    fields = in_float32(gguf_metadata.fields_from_generation(defaults))
    assert gguf_metadata.generation_from_fields(fields) == defaults
