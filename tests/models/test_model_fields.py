"""Every field of a model's config reaches a parameter's shape, an output, or a refusal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from tiny_models import CONFIG, F32, whole_batch

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import LinearScaling, Llama3Scaling, YarnScaling
from llama_jax.models.accounting import param_shapes
from llama_jax.models.llama import Llama

EAGER = dataclasses.replace(F32, scan_layers=False)
LINEAR = dataclasses.replace(
    CONFIG, rope=dataclasses.replace(CONFIG.rope, scaling=LinearScaling(factor=2.0))
)
YARN = dataclasses.replace(
    CONFIG,
    rope=dataclasses.replace(
        CONFIG.rope,
        scaling=YarnScaling(
            factor=4.0, original_max_seq_len=64, beta_fast=8.0, attention_factor=1.5
        ),
    ),
)

# Another legal value of each field, by path. `kind` picks the scaling's class.
OTHER = {
    "vocab_size": 65,
    "embed_dim": 16,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "mlp_dim": 64,
    "max_seq_len": 39,
    "norm_eps": 1e-2,
    "tie_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "init_std": 0.2,
    "head": "scalar",
    "rope.theta": 500.0,
    "rope.scaling": None,
    "rope.scaling.kind": LinearScaling(factor=CONFIG.rope.scaling.factor),
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_max_seq_len": 128,
    "rope.scaling.low_freq_factor": 2.0,
    "rope.scaling.high_freq_factor": 8.0,
}


def paths(config, prefix=""):
    """Dotted paths of all fields, of dataclasses inside too."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            if field.name != "rope":
                yield prefix + field.name
            yield from paths(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def replaced(config, path, value):
    if path.endswith(".kind"):
        path = path.removesuffix(".kind")
    head, _, rest = path.partition(".")
    if rest:
        value = replaced(getattr(config, head), rest, value)
    return dataclasses.replace(config, **{head: value})


def outcome(config):
    """Logits of a fixed seed and batch, or the refusal's text. Run op by op: nothing compiles."""
    batch = jax.tree.map(jnp.asarray, whole_batch(1, 40))
    try:
        return np.asarray(tiny_models.forward(Llama(config, EAGER, rngs=nnx.Rngs(0)), batch))
    except ConfigError as refusal:
        return str(refusal)


def differs(a, b):
    if param_shapes(a) != param_shapes(b):
        return True
    before, after = outcome(a), outcome(b)
    if isinstance(before, str) or isinstance(after, str):
        return str(before) != str(after)
    return np.abs(before - after).max() > 1e-3 * np.abs(before).max()


def test_the_table_names_every_field():
    assert set(paths(CONFIG)) == set(OTHER)
    assert isinstance(CONFIG.rope.scaling, Llama3Scaling)


@pytest.mark.parametrize("path", OTHER)
def test_changing_a_field_changes_a_shape_an_output_or_is_refused(path):
    assert differs(CONFIG, replaced(CONFIG, path, OTHER[path]))


def test_the_linear_factor_is_live():
    assert differs(LINEAR, replaced(LINEAR, "rope.scaling.factor", 3.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("factor", 8.0),
        ("original_max_seq_len", 256),
        ("beta_fast", 2.0),
        ("beta_slow", 4.0),
        ("attention_factor", None),
    ],
)
def test_every_field_of_yarn_is_live(field, value):
    assert differs(YARN, replaced(YARN, f"rope.scaling.{field}", value))


def test_the_same_config_twice_does_not_differ():
    assert not differs(CONFIG, dataclasses.replace(CONFIG))


def test_initial_weights_have_the_configured_spread_and_smaller_output_projections():
    wide = dataclasses.replace(CONFIG, embed_dim=256, mlp_dim=512, init_std=0.02, num_layers=8)
    params = tiny_models.params_of(Llama(wide, EAGER, rngs=nnx.Rngs(1)))
    for name, value in params.items():
        if name.endswith("scale"):
            assert np.all(value == 1.0)
            continue
        output = name.endswith(("o_proj", "down_proj"))
        wanted = 0.02 / np.sqrt(2 * 8) if output else 0.02
        assert value.std() == pytest.approx(wanted, rel=0.02), name
        assert abs(value.mean()) < 0.05 * wanted, name
    # Stacked layers are drawn apart.
    assert not np.any(params["layers.mlp.up_proj"][0] == params["layers.mlp.up_proj"][1])
