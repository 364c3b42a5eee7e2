"""The table of dims and axes, by its results on real meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig
from llama_jax.sharding import rules
from llama_jax.sharding.mesh import make_mesh


@pytest.mark.parametrize(
    ("dims", "shape", "spec"),
    [
        (("embed", "q_heads", "head_dim"), (32, 8, 16), P("fsdp", "tensor", None)),
        (("layers", "mlp", "embed"), (2, 64, 32), P(None, "tensor", "fsdp")),
        (("vocab", "embed"), (64, 32), P("tensor", "fsdp")),
        (("norm",), (32,), P(None)),
        (("embed", "kv_heads", "head_dim"), (32, 4, 16), P("fsdp", "tensor", None)),
        # Two heads on a tensor axis of four: whole heads everywhere.
        (("embed", "kv_heads", "head_dim"), (32, 2, 16), P("fsdp", None, None)),
    ],
)
def test_parameters_are_stored_by_the_table(dims, shape, spec):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    assert rules.param_spec(dims, shape, mesh, "w") == spec


def test_a_dim_that_does_not_divide_is_named_with_the_sizes_that_would_fit():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    with pytest.raises(ConfigError) as caught:
        rules.param_spec(("embed", "q_heads", "head_dim"), (32, 9, 64), mesh, "q_proj")
    assert str(caught.value) == (
        "mesh: q_proj: dim 'q_heads' has size 9, which mesh axis tensor of 4 doesn't divide; "
        "axis sizes that fit: 1, 3; or make the dim a multiple of 4"
    )


def test_a_batch_that_does_not_divide_names_both_axes():
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))),
        pytest.raises(ConfigError, match=r"batch: dim 'batch' has size 6, .* data x fsdp of 8"),
    ):
        rules.act_spec(("batch", "length"), (6, 16), "batch")


def test_a_weight_at_use_is_gathered_over_fsdp_and_stays_split_over_tensor():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    with jax.set_mesh(mesh):
        stored = jax.device_put(jnp.arange(64.0).reshape(8, 8), P("fsdp", "tensor"))
        gathered = rules.at_use(stored, ("embed", "mlp"))
    assert stored.addressable_shards[0].data.shape == (4, 2)
    assert gathered.addressable_shards[0].data.shape == (8, 2)
    assert gathered.sharding.spec == P(None, "tensor")
    np.testing.assert_array_equal(gathered, stored)


def test_functions_on_shards_see_local_arrays_their_index_and_sums_over_shards():
    def local(x_BV):
        assert x_BV.shape == (4, 2)
        index = rules.shard_index("vocab")
        return rules.sum_shards(x_BV.sum(1) * (index + 1), "vocab")

    x_BV = jnp.arange(64.0).reshape(8, 8)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4))):
        got_B = rules.on_shards(local, [("batch", "vocab")], ("batch",))(x_BV)
    weights_V = np.repeat([1, 2, 3, 4], 2)
    np.testing.assert_array_equal(got_B, (np.asarray(x_BV) * weights_V).sum(1))


def test_without_a_mesh_everything_is_local():
    x = jnp.ones((3, 5))
    assert rules.lay_out(x, ("batch", "vocab")) is x
    assert rules.out_spec(("batch", "vocab"), (3, 5)) is None
    run = rules.on_shards(lambda x: x + rules.shard_index("vocab"), [("batch", "vocab")], ())
    np.testing.assert_array_equal(run(x), x)
    assert rules.axis_size("vocab") == 1


@pytest.mark.parametrize(
    ("heads", "tensor", "copies"), [(8, 4, 1), (2, 4, 2), (1, 8, 8), (3, 2, 2)]
)
def test_kv_heads_are_repeated_until_the_tensor_axis_splits_them(heads, tensor, copies):
    with jax.set_mesh(make_mesh(MeshConfig(tensor=tensor))):
        assert rules.kv_head_copies(heads) == copies
        assert heads * copies % tensor == 0
