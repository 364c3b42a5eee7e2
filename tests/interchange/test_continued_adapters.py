"""An adapter that a run goes on with: its factors are the start; it must be of the run's kind."""

import dataclasses

import jax
import numpy as np
import pytest
from adapters_in_memory import SETTINGS, ArrayAdapter, random_adapter, reference, run_of
from flax import nnx
from in_memory import CONFIG, random_source
from peft_reference import FOLDER

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.opening import open_adapter
from llama_jax.interchange.starting import load_params_into
from llama_jax.interchange.tensors import InterchangeError
from llama_jax.models.lora import split_params
from llama_jax.sharding.mesh import make_mesh

F32 = ExecutionConfig(compute_dtype="float32")
SCALAR = dataclasses.replace(CONFIG, head="scalar")


def started(adapter, *, mesh=None, config=CONFIG, source=None, **changes):
    """A run's start with the adapter, the run's own adapter changed."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    wanted = dataclasses.replace(adapter.config, **changes)
    return load_params_into(
        source or random_source(), config, F32, mesh, adapter=wanted, trained=adapter
    )


def trained_part(start):
    """What a step changes, by path."""
    params, _ = split_params(nnx.state(start.model))
    return {".".join(map(str, p)): np.asarray(x[...]) for p, x in nnx.to_flat_state(params)}


@pytest.mark.parametrize("name", ["dora", "rslora"])
def test_a_run_that_goes_on_with_an_adapter_of_peft_starts_as_its_model(name):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    adapter = open_adapter(FOLDER / name)
    start = started(adapter, mesh=mesh)
    np.testing.assert_allclose(run_of(start.model, mesh), reference(name), atol=2e-5, rtol=1e-5)
    assert start.notes[0] == f"going on with the adapter of {FOLDER / name}"
    assert any(b.any() for n, b in trained_part(start).items() if n.endswith("_lora_b"))


def test_its_factors_are_the_start_and_nothing_is_drawn():
    adapter = random_adapter()
    found = trained_part(started(adapter))
    assert len(found) == 6
    up_a, up_b = (found[f"layers.mlp.up_proj{end}"] for end in ("_lora_a", "_lora_b"))
    for layer in range(2):
        name = f"layers.{layer}.mlp.up_proj"
        np.testing.assert_array_equal(up_a[layer].T, adapter.arrays[f"{name}_lora_a"])
        np.testing.assert_array_equal(up_b[layer].T, adapter.arrays[f"{name}_lora_b"])


def test_a_reward_head_comes_with_its_adapter_or_is_drawn():
    adapter = open_adapter(FOLDER / "reward")
    head = adapter.tensors["reward_head"].read_all()
    np.testing.assert_array_equal(
        trained_part(started(adapter, config=SCALAR))["reward_head"], head
    )
    # Also in place of the one that the base has.
    theirs = random_source(SCALAR)
    found = trained_part(started(adapter, config=SCALAR, source=theirs))
    np.testing.assert_array_equal(found["reward_head"], head)
    drawn = trained_part(started(random_adapter(), config=SCALAR))["reward_head"]
    assert np.abs(drawn).max() > 0
    with pytest.raises(
        ConfigError, match=r"^model\.head: 'vocab', but .*reward is a reward model's"
    ):
        started(adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, r"^adapter\.rank: 4, but 3 in arrays$"),
        ({"alpha": 8.0}, r"^adapter\.alpha: 8\.0, but 4\.0 in arrays$"),
        ({"scaling": "rslora"}, r"^adapter\.scaling: 'rslora', but 'lora' in arrays$"),
        ({"dora": True}, r"^adapter\.dora: True, but False in arrays$"),
        (
            {"targets": ("q_proj", "up_proj")},
            r"^adapter\.targets: q_proj, up_proj, but o_proj, q_proj, up_proj in arrays$",
        ),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_its_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        started(random_adapter(), **changes)


def test_the_order_of_targets_is_of_no_account():
    start = started(random_adapter(), targets=SETTINGS.targets[::-1])
    assert len(trained_part(start)) == 6


def test_incomplete_adapters_are_told_by_tensor():
    whole = random_adapter()
    name = "layers.1.mlp.up_proj_lora_a"
    arrays = {n: a for n, a in whole.arrays.items() if ".1." not in n}
    with pytest.raises(
        InterchangeError, match=r"^arrays: adapts some layers only; it has no layers"
    ):
        started(ArrayAdapter(whole.config, arrays, partial=True))
    wrong = {**whole.arrays, name: whole.arrays[name][:, :-1]}
    with pytest.raises(InterchangeError, match="has shape"):
        started(ArrayAdapter(whole.config, wrong))
