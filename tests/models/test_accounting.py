"""Formulas against published sizes and against numbers worked out by hand."""

import dataclasses

import pytest
from tiny_models import CONFIG, TIED

from llama_jax.config.files import load_model_config
from llama_jax.config.run import AdafactorConfig, AdamWConfig, LionConfig, MuonConfig
from llama_jax.models import accounting


def test_counts_of_the_tiny_model_by_hand():
    attention = 32 * 8 * 16 * 2 + 32 * 2 * 16 * 2
    layer = attention + 3 * 32 * 48
    assert accounting.matmul_params(CONFIG) == accounting.matmul_params(TIED) == 64 * 32 + 2 * layer
    norms = 2 * 2 * 32 + 32
    assert accounting.param_count(CONFIG) == 2 * 64 * 32 + 2 * layer + norms
    assert accounting.param_count(TIED) == 64 * 32 + 2 * layer + norms


def test_flops_count_each_causal_pair_once():
    seq_len = 16
    pairs = seq_len / 2  # a query sees, to first order, half of the keys
    attention = 2 * 2 * 2 * pairs * 8 * 16  # q k^T and weights v, 2 layers, 8 heads of 16
    forward = 2 * accounting.matmul_params(CONFIG) + attention
    assert accounting.flops_per_token(CONFIG, seq_len) == 3 * forward


def test_smollm2_step_of_2048_tokens_is_the_known_figure():
    flops = 2048 * accounting.flops_per_token(load_model_config("smollm2-135m"), 512)
    assert flops == pytest.approx(2048 * (6 * 134_479_872 + 6 * 30 * 512 * 576))


@pytest.mark.parametrize(
    ("name", "a_token"),
    [("llama2-7b", 524_288), ("llama3.1-8b", 131_072), ("llama3.1-70b", 327_680),
     ("llama3.1-405b", 516_096), ("llama3.2-1b", 32_768)],
)  # fmt: skip
def test_cache_bytes_a_token_are_the_published_yardsticks(name, a_token):
    config = load_model_config(name)
    assert accounting.cache_bytes(config, 1, 1, "bfloat16") == a_token
    assert accounting.cache_bytes(config, 3, 131_072, "bfloat16") == 3 * 131_072 * a_token


def test_bytes_of_parameters_and_moments():
    count = accounting.param_count(CONFIG)
    assert accounting.param_bytes(CONFIG, "bfloat16") == 2 * count
    assert accounting.optimizer_bytes(CONFIG, AdamWConfig()) == (8 * count, 0)
    assert accounting.optimizer_bytes(CONFIG, LionConfig()) == (4 * count, 0)
    assert accounting.optimizer_bytes(CONFIG, AdafactorConfig()) == (0, 0)
    # Muon keeps one moment for the layers' matrices, Adam's two for the rest.
    rest = 2 * 64 * 32 + 5 * 32
    assert accounting.optimizer_bytes(CONFIG, MuonConfig()) == (4 * (count + rest), 0)
    low = AdamWConfig(moments="bfloat16")
    assert accounting.optimizer_bytes(CONFIG, low) == (4 * count, 0)
    # On the host goes all but five norms' scales of 32.
    offloaded = dataclasses.replace(low, offload_moments=True)
    assert accounting.optimizer_bytes(CONFIG, offloaded) == (4 * 5 * 32, 4 * (count - 5 * 32))
