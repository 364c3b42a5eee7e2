"""Rows split over the context axis, gathered and going round, against one device's reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig
from llama_jax.kernels.attention import attention
from llama_jax.kernels.reference import reference_attention
from llama_jax.sharding import zigzag
from llama_jax.sharding.mesh import make_mesh

F32 = 4e-6  # absolute, values and gradients of order 1

MESHES = {
    "context 2": MeshConfig(fsdp=1, context=2),
    "context 4": MeshConfig(fsdp=1, context=4),
    "data 2 x context 2 x tensor 2": MeshConfig(data=2, fsdp=1, context=2, tensor=2),
    "fsdp 2 x context 4": MeshConfig(fsdp=2, context=4),
}


def case(B, T, N, K, H, seed=0):
    """Packed rows: one document over the whole row, others of random lengths, some padding."""
    rng = np.random.default_rng(seed)
    q, k, v, pull = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K, N))
    ids_BT = np.ones((B, T), np.int32)
    for row in ids_BT[1:]:
        cuts = np.sort(rng.integers(0, T + 1, 3))
        row[:] = 0
        row[: cuts[2]] = 1 + (np.arange(cuts[2])[:, None] >= cuts[None, :2]).sum(1)
    return q, k, v, pull, ids_BT


def reference(q, k, v, pull, ids_BT):
    def loss(q, k, v):
        ids = {"q_segment_ids_BT": ids_BT, "kv_segment_ids_BS": ids_BT}
        out = reference_attention(q, k, v, **ids, q_order_BT=None)
        return (out * pull).sum(), out

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*map(jnp.asarray, (q, k, v)))
    return out, *grads


def sharded(mesh_config, q, k, v, pull, ids_BT, **options):
    """The same through `attention` on a mesh, with rows put in zigzag order and back."""
    T = q.shape[1]
    devices = np.prod([mesh_config.data, mesh_config.fsdp, mesh_config.context, mesh_config.tensor])
    places = zigzag.zigzag_places(T, mesh_config.context)
    back = np.argsort(places)

    def loss(q, k, v, pull, ids_BT):
        ids = {"q_segment_ids_BT": ids_BT, "kv_segment_ids_BS": ids_BT}
        out = attention(q, k, v, **ids, **options)
        return (out * pull).sum(), out

    with jax.set_mesh(make_mesh(mesh_config, jax.devices()[:devices])):
        arrays = [jnp.asarray(x[:, places]) for x in (q, k, v, pull, ids_BT)]
        run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        grads, out = run(*arrays)
    return [np.asarray(x)[:, back] for x in (out, *grads)]


def close(got, wanted):
    for name, a, b in zip(("out", "q", "k", "v"), got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=F32, err_msg=name)


@pytest.mark.parametrize("context", ["gather", "ring"])
@pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=[] if "tensor" in m else pytest.mark.slow) for m in MESHES]
)
def test_blocks_on_shards_give_the_values_and_gradients_of_the_whole_row(mesh, context):
    inputs = case(2, 40 if mesh == "context 2" else 48, 4, 2, 8)
    got = sharded(MESHES[mesh], *inputs, backend="blockwise", context=context)
    close(got, reference(*inputs))


@pytest.mark.parametrize("context", ["gather", "ring"])
def test_the_tpu_kernel_on_shards_gives_the_values_and_gradients_of_the_whole_row(context):
    inputs = case(2, 512, 4, 2, 16)
    mesh = MeshConfig(fsdp=1, context=2, tensor=2)
    got = sharded(mesh, *inputs, backend="splash", context=context, interpret=True)
    close(got, reference(*inputs))


def test_blocks_that_see_nothing_are_not_computed():
    """Keys that would poison any sum: of the shard after this one no early query sees a block."""
    q, k, v, pull, ids_BT = case(1, 1024, 2, 1, 8)
    wanted = reference(q, k, v, pull, ids_BT)[0]
    v[:, 512:] = np.nan  # the later half of the row
    for context in ("gather", "ring"):
        got = sharded(
            MESHES["context 2"], q, k, v, pull, ids_BT, backend="blockwise", context=context
        )[0]
        np.testing.assert_allclose(got[:, :512], wanted[:, :512], atol=F32)


def test_each_shard_of_a_zigzag_row_has_as_many_keys_to_see():
    places = zigzag.zigzag_places(64, 4).reshape(4, 16)
    np.testing.assert_array_equal(places[0], [*range(8), *range(56, 64)])
    assert set((places + 1).sum(1)) == {64 * 65 // 2 // 4}


def test_a_backend_without_a_ring_form_is_refused_by_name():
    inputs = case(1, 16, 2, 1, 8)
    with pytest.raises(ConfigError, match=r"execution\.attention: 'reference' has no form .* auto"):
        sharded(MESHES["context 2"], *inputs, backend="reference", context="ring")
    close(sharded(MESHES["context 2"], *inputs, backend="auto", context="ring"), reference(*inputs))
