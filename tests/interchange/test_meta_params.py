import dataclasses
import random

import pytest
from in_memory import CONFIG

from llama_jax.config.files import load_model_config
from llama_jax.config.loading import ConfigError
from llama_jax.config.model import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from llama_jax.interchange.meta_params import (
    config_from_params,
    ffn_params,
    mlp_dim,
    params_from_config,
)
from llama_jax.interchange.tensors import InterchangeError


def params(dim, layers, heads, kv=None, *, vocab=-1, multiple=256, ffn=None, **others):
    """A `params.json` as released."""
    table = {"dim": dim, "n_layers": layers, "n_heads": heads, "vocab_size": vocab}
    table |= {"multiple_of": multiple, "norm_eps": others.pop("eps", 1e-5)}
    if kv is not None:
        table["n_kv_heads"] = kv
    if ffn is not None:
        table["ffn_dim_multiplier"] = ffn
    return table | others


L3 = {"vocab": 128256, "rope_theta": 500000.0}
L31 = L3 | {"use_scaled_rope": True}
RELEASED = {
    "llama1-7b": params(4096, 32, 32, eps=1e-6),
    "llama1-13b": params(5120, 40, 40, eps=1e-6),
    "llama1-33b": params(6656, 60, 52, eps=1e-6),
    "llama2-7b": params(4096, 32, 32),
    "llama2-13b": params(5120, 40, 40),
    "llama2-70b": params(8192, 80, 64, 8, multiple=4096, ffn=1.3),
    "codellama-7b": params(4096, 32, 32, rope_theta=1000000),
    "codellama-34b": params(8192, 48, 64, 8, ffn=1.0, rope_theta=1000000),
    "llama3-8b": params(4096, 32, 32, 8, multiple=1024, ffn=1.3, **L3),
    "llama3-70b": params(8192, 80, 64, 8, multiple=4096, ffn=1.3, **L3),
    "llama3.1-8b": params(4096, 32, 32, 8, multiple=1024, ffn=1.3, **L31),
    "llama3.1-70b": params(8192, 80, 64, 8, multiple=4096, ffn=1.3, **L31),
    "llama3.1-405b": params(16384, 126, 128, 8, multiple=4096, ffn=1.2, **L31),
    "llama3.2-1b": params(2048, 16, 32, 8, ffn=1.5, **L31),
    "llama3.2-3b": params(3072, 28, 24, 8, ffn=1.0, **L31),
    "llama3.3-70b": params(8192, 80, 64, 8, multiple=4096, ffn=1.3, **L31),
}
OURS = ("max_context_len", "rope_scaling_factor", "rope_low_freq_factor",
        "rope_high_freq_factor", "rope_original_max_seq_len")  # fmt: skip


def read(table, *, vocab_size=288, tied=False):
    return config_from_params(table, "params.json", vocab_size=vocab_size, tie_embeddings=tied)


def shipped(name):
    """Without the initialiser's spread, of which a checkpoint says nothing."""
    return dataclasses.replace(load_model_config(name), init_std=0.02)


@pytest.mark.parametrize("name", RELEASED)
def test_a_release_is_read_from_what_its_file_says(name):
    wanted = shipped(name)
    config = read(RELEASED[name], vocab_size=wanted.vocab_size, tied=wanted.tie_embeddings)
    assert config == wanted


@pytest.mark.parametrize("name", RELEASED)
def test_a_release_is_written_without_keys_of_ours(name):
    wanted = shipped(name)
    table = params_from_config(wanted)
    assert not set(table) & set(OURS)
    assert read(table, tied=wanted.tie_embeddings) == wanted
    stated = {k: v for k, v in RELEASED[name].items() if k != "vocab_size"}
    told = {k: v for k, v in table.items() if k != "vocab_size"}
    # A multiplier of 1 is no multiplier.
    assert told == {k: v for k, v in stated.items() if (k, v) != ("ffn_dim_multiplier", 1.0)}


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-360m", "smollm2-1.7b", "tinyllama-1.1b"])
def test_other_llamas_come_back_through_keys_of_ours(name):
    wanted = shipped(name)
    table = params_from_config(wanted)
    assert table["max_context_len"] == wanted.max_seq_len
    assert read(table, tied=wanted.tie_embeddings) == wanted


def test_any_llama3_scaling_comes_back():
    scaling = Llama3Scaling(7.1, 1000, low_freq_factor=1.5, high_freq_factor=3.5)
    config = dataclasses.replace(CONFIG, rope=RopeConfig(12345.678, scaling))
    assert read(params_from_config(config)) == config


def test_the_mlps_width_by_metas_formula():
    assert mlp_dim(4096, 256, None) == 11008
    assert mlp_dim(4096, 1024, 1.3) == 14336
    assert mlp_dim(8192, 4096, 1.3) == 28672
    assert mlp_dim(16384, 4096, 1.2) == 53248
    assert mlp_dim(2048, 256, 1.5) == 8192
    assert mlp_dim(576, 256, None) == 1536


def test_any_width_of_the_mlp_has_a_formula():
    numbers = random.Random(0)
    for _ in range(500):
        dim, wanted = numbers.randint(8, 20000), numbers.randint(1, 80000)
        assert mlp_dim(dim, *ffn_params(dim, wanted)) == wanted
    assert ffn_params(576, 1536) == (256, None)


def test_no_formula_is_an_error_that_names_the_field():
    # A width of 0 has nothing to multiply.
    with pytest.raises(InterchangeError, match=r"model.mlp_dim: no multiple_of .* give 5 for"):
        ffn_params(0, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 16}, "model.head_dim can't be written.* always embed_dim / num_heads"),
        ({"attention_bias": True}, "model.attention_bias can't be written"),
        ({"mlp_bias": True}, "model.mlp_bias can't be written"),
        ({"rope": RopeConfig(1e4, LinearScaling(factor=2.0))}, "model.rope.scaling .*'linear'"),
        ({"rope": RopeConfig(1e4, YarnScaling(2.0, 64))}, "model.rope.scaling .*'yarn'"),
    ],
)
def test_what_the_layout_cannot_say_is_refused(changes, message):
    with pytest.raises(InterchangeError, match=message):
        params_from_config(dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "params.json: dim: missing key"),
        ({"n_layers": "2"}, "n_layers: expected a whole number, got '2'"),
        ({"n_heads": 7}, "n_heads: 7 doesn't divide dim, 64"),
        ({"n_kv_heads": 3}, "n_kv_heads: 3 does not divide num_heads, 8"),
        ({"multiple_of": 0}, "multiple_of: 0 is not above 0"),
        ({"norm_eps": "x"}, "norm_eps: expected a number"),
        ({"use_scaled_rope": 1}, "use_scaled_rope: expected true or false, got 1"),
        ({"rope_scaling_factor": 8.0}, "rope_scaling_factor: given without use_scaled_rope"),
        ({"rope_thetta": 1.0}, r"rope_thetta: unknown key \(did you mean 'rope_theta'\?\)"),
        ({"moe_args": {"num_experts": 16}}, "moe_args: unknown key"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args: unknown key"),
    ],
)
def test_what_is_wrong_is_told_by_key(changes, message):
    table = params(64, 2, 8, 2) | changes
    with pytest.raises(ConfigError, match=message):
        read({key: value for key, value in table.items() if value is not None})
