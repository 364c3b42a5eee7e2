"""`config.json` of every age to `ModelConfig`, and back."""

import dataclasses

import pytest
from tiny_checkpoints import CASES, config_table

from llama_jax.config.files import load_model_config
from llama_jax.config.loading import ConfigError
from llama_jax.config.model import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from llama_jax.interchange.hugging_face_config import from_config_json, to_config_json
from llama_jax.models.rope import frequencies

PLAIN = CASES["multi_head_plain"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(config=PLAIN, style="old", **changes):
    table = config_table(config, style) | changes
    return from_config_json({k: v for k, v in table.items() if v != "absent"}, "config.json")


@pytest.mark.parametrize("style", ["old", "new", "oldest"])
@pytest.mark.parametrize("name", CASES)
def test_every_age_of_config_gives_the_same_model(name, style):
    assert read(CASES[name], style) == CASES[name]


@pytest.mark.parametrize(
    "name", [*CASES, "llama2-7b", "llama3.1-405b", "llama3.2-1b", "tinyllama-1.1b", "smollm2-135m"]
)
def test_what_is_written_is_read_as_the_same_model(name):
    config = CASES.get(name) or load_model_config(name)
    table = to_config_json(config, "bfloat16")
    assert from_config_json(table, "config.json") == config
    assert (table["architectures"], table["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert table["dtype"] == table["torch_dtype"] == "bfloat16"
    # Each reader looks at other keys: all of them say the same.
    only_new = {k: v for k, v in table.items() if k not in ("rope_theta", "rope_scaling")}
    only_old = {k: v for k, v in table.items() if k != "rope_parameters"}
    assert from_config_json(only_new, "new") == from_config_json(only_old, "old") == config


def test_absent_fields_are_what_transformers_takes_them_for():
    absent = dict.fromkeys(
        ("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta", "rms_norm_eps",
         "attention_bias", "mlp_bias", "max_position_embeddings", "architectures", "hidden_act"),
        "absent",
    )  # fmt: skip
    config = read(**absent)
    assert (config.num_kv_heads, config.head_dim) == (8, 4)
    biases = (config.attention_bias, config.mlp_bias)
    assert (config.tie_embeddings, *biases) == (False, False, False)
    assert (config.rope, config.norm_eps, config.max_seq_len) == (RopeConfig(10000.0), 1e-6, 2048)
    assert read(head_dim=None).head_dim == 4
    # What doesn't change the mathematics is passed over.
    assert read(pretraining_tp=2, attention_dropout=0.1, use_cache=False) == PLAIN


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_llama3_scaling_is_read_under_both_keys_of_its_kind(key):
    block = {key if k == "rope_type" else k: v for k, v in LLAMA3.items()}
    scaling = read(rope_scaling=block, rope_theta=5e5).rope.scaling
    assert scaling == Llama3Scaling(factor=8.0, original_max_seq_len=8192)


def test_llama31s_file_gives_its_frequencies():
    rope = read(rope_scaling=LLAMA3, rope_theta=500000.0).rope
    found = frequencies(rope, 128)
    wanted = {29: 2.166570764e-03, 30: 1.371893568e-03, 34: 1.785078128e-04, 35: 9.556212354e-05}
    for pair, value in (wanted | {63: 3.068925989e-07}).items():
        assert found[pair] == pytest.approx(value, rel=1e-6)


def test_yarn_reads_deepseeks_weights_of_its_temperature():
    block = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32}
    assert read(rope_scaling=block).rope.scaling == YarnScaling(40.0, 32)
    weighted = read(rope_scaling=block | {"mscale": 0.5, "mscale_all_dim": 1.0}).rope.scaling
    # (0.05 ln 40 + 1) / (0.1 ln 40 + 1)
    assert weighted.attention_factor == pytest.approx(0.8652600, abs=1e-6)
    block = {"type": "yarn", "original_max_position_embeddings": 16}
    assert read(rope_scaling=block).rope.scaling.factor == 4.0


def test_an_original_length_that_is_not_said_is_the_models():
    block = {k: v for k, v in LLAMA3.items() if not k.startswith("original")}
    assert read(rope_scaling=block).rope.scaling.original_max_seq_len == 64


def test_both_rope_blocks_are_accepted_where_they_agree():
    both = {
        "rope_scaling": {"type": "linear", "factor": 2},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    }
    assert read(**both).rope == RopeConfig(10000.0, LinearScaling(factor=2.0))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "mistral"}, "model_type: 'mistral' is not supported; supported is model_t"),
        ({"model_type": "qwen2"}, "'qwen2' is not supported; supported is model_type 'llama'"),
        ({"model_type": "absent", "architectures": []}, "model_type: missing key; supported is"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures: ['LlamaForTok"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "num_labels: 2 labels; a reward"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu': only 'silu' or 'swish' is supported"),
        ({"sliding_window": 4096}, "sliding_window: 4096: it is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: an object: it is not supp"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier: 12.0: only 1 is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5: only 1 is supported"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: only full_attention"),
        ({"hidden_size": "absent", "hiden_size": 32}, "hidden_size: missing key (did you mean 'h"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: expected a whole number, got 2.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_heads, 8"),
        ({"num_attention_heads": 5, "head_dim": None}, "head_dim: absent, and 5 heads don't divi"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: 0.0 must be above 0"),
        ({"vocab_size": -1}, "vocab_size: -1 must be above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, got 'yes'"),
        ({"rope_theta": "big"}, "rope_theta: expected a number, got 'big'"),
        ({"rope_theta": -1.0}, "rope_theta: -1.0 must be above 0"),
    ],
)
def test_what_the_model_has_no_form_for_is_refused_by_its_name_in_the_file(changes, complaint):
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ({"type": "dynamic", "factor": 2.0}, "rope_type: 'dynamic' is not supported: its freq"),
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope' is not supported: its frequencies"),
        ({"rope_type": "lama3", "factor": 2.0}, "unknown value 'lama3' (did you mean 'llama3'?)"),
        ({"factor": 2.0}, "rope_scaling.rope_type: missing key"),
        ({"rope_type": "linear"}, "rope_scaling.factor: missing key"),
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor: expected a number, got '2'"),
        ({"rope_type": "linear", "factor": 0.0}, "rope_scaling.factor: 0.0 must be above 0"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "'linear' contradicts type 'yarn"),
        (LLAMA3 | {"low_freq": 1.0}, "low_freq: unknown key for llama3 scaling (did you mean 'low"),
        (LLAMA3 | {"low_freq_factor": None}, "rope_scaling.low_freq_factor: missing key"),
        (LLAMA3 | {"rope_theta": 5e5}, "contradicting values: rope_theta 10000 and rope_scaling"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate: only true is support"),
        ([1, 2], "rope_scaling: expected an object, got [1, 2]"),
    ],
)
def test_a_wrong_rope_block_is_refused(block, complaint):
    with pytest.raises(ConfigError) as caught:
        read(rope_scaling=block)
    assert complaint in str(caught.value)


def test_rope_blocks_that_disagree_are_refused():
    both = {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    }
    with pytest.raises(ConfigError, match="rope_scaling: contradicts rope_parameters"):
        read(**both)


def test_every_field_of_a_model_is_written():
    # A field that to_config_json forgot would come back as its default.
    changed = {
        "vocab_size": 65, "embed_dim": 40, "num_layers": 3, "num_heads": 16, "num_kv_heads": 4,
        "head_dim": 6, "mlp_dim": 50, "max_seq_len": 99, "norm_eps": 3e-5,
        "rope": RopeConfig(123.0), "tie_embeddings": True, "attention_bias": True,
        "mlp_bias": True, "init_std": 0.05, "head": "scalar",
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(PLAIN)}
    for name, value in changed.items():
        config = dataclasses.replace(PLAIN, **{name: value})
        assert config != PLAIN
        assert from_config_json(to_config_json(config, "float32"), "config.json") == config
