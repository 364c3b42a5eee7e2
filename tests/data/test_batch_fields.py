import dataclasses
import math

import numpy as np
import pytest

from llama_jax.config.loading import ConfigError, from_table
from llama_jax.config.run import DataConfig, MeshConfig
from llama_jax.data.device import field_sharding, to_device
from llama_jax.data.fields import BY_RESPONSE, batch_fields
from llama_jax.sharding.mesh import make_mesh


def config(source, **changes):
    table = {"seq_len": 16, "batch_size": 8, "packing": "best_fit", **changes}
    return from_table(DataConfig, {**table, "sources": [{"name": "a", **source}]}, "here")


PREFERENCES = {"preferences": {"path": "p.jsonl"}}


def test_the_fields_of_preferences_follow_from_the_config():
    fields = batch_fields(config(PREFERENCES, responses_per_row=4), reference_logps=True)
    assert {name: field.shape for name, field in fields.items()} == {
        **dict.fromkeys(
            ("tokens", "targets", "loss_mask", "positions", "segment_ids", "response_ids"), (8, 16)
        ),
        **dict.fromkeys(("chosen", "rejected", "strength", "roles", "reference_logps"), (8, 4)),
    }
    floats = {name for name, field in fields.items() if field.dtype == np.float32}
    assert floats == {"loss_mask", "reference_logps"}


def test_a_teacher_adds_its_top_tokens():
    fields = batch_fields(config({"conversations": {"path": "c.jsonl"}}), teacher_top_k=3)
    assert fields["teacher_ids"] == ((8, 16, 3), np.int32)
    assert fields["teacher_logps"] == ((8, 16, 3), np.float32)
    with pytest.raises(ValueError, match="reference log-probabilities are of preferences"):
        batch_fields(config({"shards": "s"}), reference_logps=True)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 1, 4, 2)])
def test_every_kind_of_field_arrives_on_the_devices_as_it_is(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    # As many responses as places: what isn't split over the length is told by its name.
    fields = batch_fields(
        config(PREFERENCES, responses_per_row=16), reference_logps=True, teacher_top_k=3
    )
    generator = np.random.default_rng(0)
    batch = {
        name: generator.integers(1, 99, field.shape).astype(field.dtype)
        for name, field in fields.items()
    }
    arrays = to_device(batch, mesh)
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(array), batch[name])
        assert array.sharding.is_equivalent_to(field_sharding(name, mesh), array.ndim)
        split = sizes[0] * sizes[1] * (1 if name in BY_RESPONSE else sizes[2])
        assert math.prod(array.addressable_shards[0].data.shape) * split == array.size


def test_what_can_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="give one of shards, text, conversations and pref"):
        config({"shards": "s", **PREFERENCES})
    with pytest.raises(ConfigError, match="'concat' would cut preferences"):
        config(PREFERENCES, packing="concat")
    with pytest.raises(ConfigError, match="either preferences or text and conversations"):
        config(PREFERENCES, held_out=[{"name": "b", "shards": "s"}])
    with pytest.raises(ConfigError, match="would see the others behind a shared prompt"):
        config({"preferences": {"path": "p", "shared_prompt": True, "mismatched": True}})
    with pytest.raises(ConfigError, match=r"preferred: has no meaning for form 'openai'"):
        config({"conversations": {"path": "p", "form": "openai", "preferred": "best"}})
    with pytest.raises(ConfigError, match=r"strengths.*better"):
        config({"preferences": {"path": "p", "strengths": ["beter"]}})
    mixed = config({"conversations": {"path": "c"}}, held_out=[{"name": "b", "shards": "s"}])
    assert mixed.kind == "conversations"
    assert dataclasses.replace(mixed, held_out=()).responses_per_row == 8
