"""The start-up comparison: passes what is right on every mesh, refuses what isn't, costs little."""

import jax
import jax.numpy as jnp
import pytest

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import MeshConfig
from llama_jax.kernels import attention as backends
from llama_jax.kernels.blockwise import blockwise_attention
from llama_jax.kernels.self_check import choose_and_check
from llama_jax.sharding.mesh import make_mesh

ONE = MeshConfig()
RUN = {
    **{"backend": "blockwise", "context": "gather", "dtype": "bfloat16", "check": True},
    **{"rows": 8, "length": 64, "num_heads": 8, "num_kv_heads": 4, "head_dim": 16},
}


def said(mesh=ONE, devices=1, **changes):
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:devices])):
        return choose_and_check(**{**RUN, **changes})


def test_a_right_backend_is_said_to_be_equal():
    assert said().startswith("attention: blockwise on cpu; equal to reference within 0.0")
    exact = said(dtype="float32").rsplit(" ", 1)[1]
    assert float(exact) < 1e-5


def test_it_runs_on_the_meshes_that_training_runs_on():
    mesh = MeshConfig(fsdp=2, context=2, tensor=2)
    assert "equal to reference" in said(mesh, 8)
    assert "equal to reference" in said(mesh, 8, context="ring", backend="auto")


def test_the_reference_is_not_compared_with_itself():
    assert said(backend="reference") == "attention: reference on cpu"
    assert said(check=False) == "attention: blockwise on cpu; not checked"


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (
            lambda ids: jnp.where(ids == 2, 1, ids),
            "the output",
        ),  # the second segment sees the first
        (lambda ids: jnp.where(ids == 0, 3, ids), "the output"),  # padding is seen and sees
    ],
    ids=["segments that leak", "padding that counts"],
)
def test_a_backend_with_a_wrong_mask_is_refused(monkeypatch, fault, what):
    def broken(q, k, v, *, q_segment_ids_BT, kv_segment_ids_BS, q_order_BT):
        ids = {"q_segment_ids_BT": fault(q_segment_ids_BT)}
        ids["kv_segment_ids_BS"] = fault(kv_segment_ids_BS)
        return blockwise_attention(q, k, v, **ids, q_order_BT=q_order_BT)

    monkeypatch.setitem(backends.BACKENDS, "blockwise", broken)
    with pytest.raises(ConfigError, match=rf"'blockwise' computes {what} wrongly on cpu.*0\.03 is"):
        said()
    assert said(check=False).endswith("not checked")


@pytest.mark.short
def test_wrong_gradients_and_nan_are_refused_too(monkeypatch):
    def broken(q, k, v, **options):
        right = blockwise_attention(q, k, v, **options)
        return right + scale * (v - jax.lax.stop_gradient(v)).repeat(2, axis=2)

    monkeypatch.setitem(backends.BACKENDS, "blockwise", broken)
    scale = 0.5
    with pytest.raises(ConfigError, match="the gradient of v wrongly"):
        said()
    scale = jnp.nan
    with pytest.raises(ConfigError, match=r"the output wrongly on cpu: it differs .* by nan"):
        said()
