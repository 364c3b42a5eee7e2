"""The shipped model configs: the whole set, their published parameter counts, their scaling."""

import pytest

from llama_jax.config.files import load_model_config, shipped_configs
from llama_jax.config.model import Llama3Scaling
from llama_jax.models.accounting import param_count

PUBLISHED = {
    "llama1-7b": 6_738_415_616,
    "llama1-13b": 13_015_864_320,
    "llama1-33b": 32_528_943_616,
    "llama1-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "codellama-70b": 68_976_910_336,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
# max_seq_len, theta, norm_eps: what a parameter count doesn't see.
REST = {
    "llama1": (2048, 1e4, 1e-6),
    "llama2": (4096, 1e4, 1e-5),
    "codellama": (16384, 1e6, 1e-5),
    "llama3": (8192, 5e5, 1e-5),
    "llama3.1": (131072, 5e5, 1e-5),
    "llama3.2": (131072, 5e5, 1e-5),
    "llama3.3": (131072, 5e5, 1e-5),
    "tinyllama": (2048, 1e4, 1e-5),
    "smollm2": (8192, 1e5, 1e-5),
}
# head_dim, kv heads and width of the same count can be traded; the grouped ones are written out.
HEADS = {
    "llama2-70b": (64, 8, 128),
    "llama3.1-405b": (128, 8, 128),
    "llama3.2-1b": (32, 8, 64),
    "llama3.2-3b": (24, 8, 128),
    "smollm2-135m": (9, 3, 64),
    "tinyllama-1.1b": (32, 4, 64),
}


def test_the_files_are_the_dense_releases_and_nothing_else():
    files = (shipped_configs() / "models").glob("*.toml")
    assert {file.stem for file in files} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_the_published_number_of_parameters(name):
    assert param_count(load_model_config(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_context_theta_and_eps_are_the_releases(name):
    config = load_model_config(name)
    length, theta, eps = REST[name.rpartition("-")[0]]
    theta = 1.3e5 if name == "smollm2-1.7b" else theta
    assert (config.max_seq_len, config.rope.theta, config.norm_eps) == (length, theta, eps)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rope_scaling_is_llama3_from_3_1_on_with_the_factor_of_the_release(name):
    factor = {"llama3.1": 8.0, "llama3.2": 32.0, "llama3.3": 8.0}.get(name.rpartition("-")[0])
    wanted = factor and Llama3Scaling(factor=factor, original_max_seq_len=8192)
    assert load_model_config(name).rope.scaling == wanted


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_the_releases(name):
    config = load_model_config(name)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == HEADS[name]
