"""The whole network: values against NumPy, causality, isolation, refusals, execution choices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest
import tiny_models
from flax import nnx
from tiny_models import CONFIG, F32, TIED, make, packed_batch, params_of, whole_batch

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import LinearScaling, RopeConfig
from llama_jax.config.run import ExecutionConfig
from llama_jax.models.llama import Llama

LOGITS = 2e-5
GRADIENT = 1e-5  # of the largest entry: float32 sums in another order, over large weights

CONFIGS = {
    "untied, grouped, llama3": CONFIG,
    "tied": TIED,
    "multi-head, plain rope": dataclasses.replace(
        CONFIG, num_kv_heads=8, rope=RopeConfig(500.0), head_dim=4
    ),
    "one kv head, linear": dataclasses.replace(
        CONFIG, num_kv_heads=1, rope=RopeConfig(1e4, LinearScaling(factor=2.0)), num_layers=3
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_numpy(name):
    config, batch = CONFIGS[name], packed_batch(3, 21)
    model, mesh = make(config)
    wanted = numpy_llama.logits(params_of(model), config, batch)
    got = tiny_models.logits(model, mesh, batch)
    assert got.dtype == np.float32
    assert np.abs(wanted).max() > 1.0
    real_BT = batch["segment_ids"] != 0
    np.testing.assert_allclose(got[real_BT], wanted[real_BT], atol=LOGITS * np.abs(wanted).max())


def test_a_later_token_changes_no_earlier_logits():
    model, mesh = make()
    batch = whole_batch(1, 16)
    before = tiny_models.logits(model, mesh, batch)
    batch["tokens"][0, 9] = (batch["tokens"][0, 9] + 1) % 64
    after = tiny_models.logits(model, mesh, batch)
    np.testing.assert_array_equal(after[0, :9], before[0, :9])
    assert np.all(np.any(after[0, 9:] != before[0, 9:], axis=-1))


def two_documents():
    batch = whole_batch(1, 16)
    batch["segment_ids"][0, 7:], batch["segment_ids"][0, 14:] = 2, 0
    batch["positions"][0, 7:] = np.arange(9)
    return batch


@pytest.mark.parametrize("attention", ["reference", "blockwise"])
def test_a_document_is_bit_equal_whatever_stands_before_it_and_in_the_padding(attention):
    model, mesh = make(execution=dataclasses.replace(F32, attention=attention))
    batch = two_documents()
    before = tiny_models.logits(model, mesh, batch)
    batch["tokens"][0, :7] = (batch["tokens"][0, :7] + 5) % 64
    batch["tokens"][0, 14:] = 1
    after = tiny_models.logits(model, mesh, batch)
    np.testing.assert_array_equal(after[0, 7:14], before[0, 7:14])
    assert np.all(np.any(after[0, :7] != before[0, :7], axis=-1))


@pytest.mark.parametrize("attention", ["reference", "blockwise"])
def test_no_gradient_crosses_a_document_border(attention):
    model, mesh = make(execution=dataclasses.replace(F32, attention=attention))
    batch = two_documents()
    # Ids that only one of the documents, or the padding, has: their rows of the embedding's
    # gradient tell the documents apart.
    batch["tokens"][0] = [*range(7), *range(32, 39), 63, 63]
    graphdef, params = nnx.split(model)
    mine_BT = np.zeros((1, 16), np.float32)
    mine_BT[0, 7:14] = 1.0

    @jax.jit
    @jax.grad
    def grad(params):
        logits_BTV = tiny_models.forward(nnx.merge(graphdef, params), batch)
        return (logits_BTV**2 * mine_BT[..., None]).sum()

    with jax.set_mesh(mesh):
        grad_VD = np.asarray(grad(params)["embedding"][...])
    assert np.all(np.any(grad_VD[32:39] != 0.0, axis=-1))
    others_V = np.setdiff1d(np.arange(64), np.arange(32, 39))
    assert np.all(grad_VD[others_V] == 0.0)


def test_a_packed_document_has_the_logits_it_has_alone():
    model, mesh = make()
    batch = two_documents()
    packed = tiny_models.logits(model, mesh, batch)
    alone = {
        "tokens": batch["tokens"][:, 7:14],
        "positions": batch["positions"][:, 7:14],
        "segment_ids": np.ones((1, 7), np.int32),
    }
    np.testing.assert_allclose(packed[:, 7:14], tiny_models.logits(model, mesh, alone), atol=LOGITS)


def test_padding_leaves_gradients_finite_and_of_its_own_tokens_zero():
    model, mesh = make()
    batch = packed_batch(2, 12, seed=3)
    batch["tokens"] = np.where(batch["segment_ids"] != 0, batch["tokens"] % 63, 63)
    _, grads = tiny_models.loss_and_grads(model, mesh, batch)
    assert all(np.all(np.isfinite(grad)) for grad in grads.values())
    assert np.all(grads["embedding"][63] == 0.0)


def test_a_row_over_max_seq_len_is_refused_with_both_lengths():
    model, mesh = make(dataclasses.replace(CONFIG, max_seq_len=16))
    with pytest.raises(ConfigError, match=r"17 tokens is longer .* max_seq_len, 16"):
        tiny_models.logits(model, mesh, whole_batch(1, 17))
    assert tiny_models.logits(model, mesh, whole_batch(1, 16)).shape == (1, 16, 64)


def test_a_tied_model_has_one_matrix_and_one_gradient_from_both_uses():
    tied, mesh = make(TIED)
    assert "lm_head" not in params_of(tied)
    untied, _ = make(CONFIG)
    nnx.update(untied, nnx.state(tied))
    untied.lm_head[...] = tied.embedding[...].T
    batch = whole_batch(2, 8)
    _, grads = tiny_models.loss_and_grads(tied, mesh, batch)
    _, parts = tiny_models.loss_and_grads(untied, mesh, batch)
    total = parts["embedding"] + parts["lm_head"].T
    np.testing.assert_allclose(grads["embedding"], total, atol=2e-6 * np.abs(total).max())


@functools.cache
def plain_loss_and_grads():
    return tiny_models.loss_and_grads(*make(), packed_batch(2, 16))


@pytest.mark.parametrize(
    "execution",
    [
        dataclasses.replace(F32, scan_layers=False),
        dataclasses.replace(F32, remat="dots"),
        dataclasses.replace(F32, remat="block"),
        dataclasses.replace(F32, remat="full"),
        dataclasses.replace(F32, remat="full", scan_layers=False),
        dataclasses.replace(F32, attention="blockwise"),
    ],
    ids=lambda e: f"{e.attention}-{e.remat}-{'scan' if e.scan_layers else 'loop'}",
)
def test_how_it_is_executed_changes_no_loss_and_no_gradient(execution):
    batch = packed_batch(2, 16)
    wanted, wanted_grads = plain_loss_and_grads()
    got, grads = tiny_models.loss_and_grads(*make(execution=execution), batch)
    assert got == pytest.approx(wanted, rel=1e-6)
    for name, grad in grads.items():
        scale = np.abs(wanted_grads[name]).max()
        np.testing.assert_allclose(grad, wanted_grads[name], atol=GRADIENT * scale, err_msg=name)


def saved_bytes(execution):
    """Bytes that the forward pass keeps for the backward pass, besides the parameters."""
    config = dataclasses.replace(CONFIG, num_layers=8, mlp_dim=512)
    graphdef, params = nnx.split(Llama(config, execution, rngs=nnx.Rngs(0)))
    batch = jax.tree.map(jnp.asarray, whole_batch(2, 64))

    def forward(params):
        return tiny_models.forward(nnx.merge(graphdef, params), batch).sum()

    pull = jax.eval_shape(lambda params: jax.vjp(forward, params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


def test_each_remat_policy_keeps_less_than_the_one_before():
    kept = [
        saved_bytes(dataclasses.replace(F32, remat=name))
        for name in ("none", "dots", "block", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


def test_bfloat16_compute_keeps_float32_parameters_logits_and_is_close():
    batch = whole_batch(2, 16)
    low, mesh = make(execution=ExecutionConfig(compute_dtype="bfloat16"))
    assert {value.dtype.name for value in params_of(low).values()} == {"float32"}
    got = tiny_models.logits(low, mesh, batch)
    assert got.dtype == np.float32
    wanted = tiny_models.logits(*make(), batch)
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 0.05  # really bfloat16, and no worse than it must be
    with jax.set_mesh(mesh):
        x_BTD = low.hidden(
            jnp.asarray(batch["tokens"]),
            positions_BT=jnp.asarray(batch["positions"]),
            segment_ids_BT=jnp.asarray(batch["segment_ids"]),
        )
        assert x_BTD.dtype == low.head_DV().dtype == jnp.bfloat16
    stored, _ = make(execution=ExecutionConfig(param_dtype="bfloat16"))
    assert {value.dtype.name for value in params_of(stored).values()} == {"bfloat16"}
