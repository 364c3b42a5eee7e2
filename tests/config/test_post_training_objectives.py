"""Objectives' tables: the papers' defaults, and nothing that is accepted and ignored."""

import pytest

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError, from_table
from llama_jax.config.post_training import DistillConfig, DPOConfig, RewardConfig


def test_defaults_are_those_of_the_llama_3_paper():
    dpo = DPOConfig()
    assert (dpo.loss, dpo.beta, dpo.nll_weight, dpo.label_smoothing) == ("sigmoid", 0.1, 0.2, 0.0)
    assert dpo.reference_source == "cached"
    assert (RewardConfig().margins, RewardConfig().mean_reward_penalty) == ("none", 0.0)
    distill = DistillConfig("teacher")
    assert (distill.divergence, distill.temperature) == ("forward_kl", 1.0)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"gamma": 0.5}, "gamma: has no meaning for loss 'sigmoid', only for simpo"),
        ({"gamma": 0.0}, "gamma: has no meaning for loss 'sigmoid', only for simpo"),
        ({"loss": "simpo"}, "gamma: missing key"),
        ({"loss": "simpo", "gamma": 0.5, "reference": "live"}, "reference: has no meaning"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing: has no meaning for loss 'ipo'"),
        ({"loss": "dop"}, "loss: unknown value 'dop'"),
        ({"desirable_weight": 1.0}, "desirable_weight: has no meaning for loss 'sigmoid'"),
        ({"beta": 0.0}, "beta: 0.0 must be above 0"),
        ({"label_smoothing": 0.6}, "label_smoothing: 0.6 is over the most allowed, 0.5"),
    ],
)
def test_a_preference_option_without_effect_is_an_error(table, error):
    with pytest.raises(ConfigError) as caught:
        from_table(DPOConfig, table, "run.toml")
    assert str(caught.value).startswith(f"run.toml: {error}")


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"beta": 0.5}, "beta: has no meaning for divergence 'forward_kl', only for jsd"),
        ({"divergence": "jsd", "beta": 1.0}, "beta: must be below 1"),
        ({"temperature": 0.0}, "temperature: 0.0 must be above 0"),
        ({"divergence": "kl"}, "divergence: unknown value 'kl'"),
        ({"top_k": 8}, "top_k: has no meaning for a live teacher"),
    ],
)
def test_a_distillation_option_without_effect_is_an_error(table, error):
    with pytest.raises(ConfigError) as caught:
        from_table(DistillConfig, {"path": "teacher", **table}, "run.toml")
    assert str(caught.value).startswith(f"run.toml: {error}")


def test_a_continued_adapter_needs_the_table_of_what_trains():
    settings = ["init.path=base", "init.adapter=before", "adapter.rank=4"]
    config = load_run_config("debug/dpo", settings)
    assert (config.init.adapter, config.objective.reference_source) == ("before", "cached")
    with pytest.raises(ConfigError, match=r"init\.adapter: give the table 'adapter' too"):
        load_run_config("debug/dpo", settings[:2])


def test_kto_takes_weights_and_simpo_reads_no_reference():
    config = from_table(DPOConfig, {"loss": "kto", "desirable_weight": 1.33}, "run.toml")
    assert (config.desirable_weight, config.undesirable_weight) == (1.33, None)
    assert DPOConfig(loss="simpo", gamma=1.0).reference_source is None
