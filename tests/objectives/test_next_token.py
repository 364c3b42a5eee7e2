"""Next-token prediction: sums against a plain NumPy cross entropy, packing, masking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.model import ModelConfig, RopeConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig, NextTokenConfig
from llama_jax.models.init import make_model
from llama_jax.objectives.objective import make_objective
from llama_jax.sharding.mesh import make_mesh

RTOL_F32 = 1e-5
EXECUTION = ExecutionConfig(compute_dtype="float32", loss_chunk_size=5)
CONFIG = ModelConfig(
    vocab_size=32,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    max_seq_len=16,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    tie_embeddings=True,
    init_std=0.3,
)
# Two documents, A B C E and D E', as in the picture in `data.rows`.
PACKED = {
    "tokens": [[3, 5, 7, 9, 11, 9]],
    "targets": [[5, 7, 9, 0, 9, 0]],
    "loss_mask": [[1, 1, 1, 0, 1, 0]],
    "positions": [[0, 1, 2, 3, 0, 1]],
    "segment_ids": [[1, 1, 1, 1, 2, 2]],
}
APART = {
    "tokens": [[3, 5, 7, 9], [11, 9, 0, 0]],
    "targets": [[5, 7, 9, 0], [9, 0, 0, 0]],
    "loss_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
    "positions": [[0, 1, 2, 3], [0, 1, 0, 0]],
    "segment_ids": [[1, 1, 1, 1], [1, 1, 0, 0]],
}


def arrays(batch):
    return {
        name: jnp.asarray(rows, jnp.float32 if name == "loss_mask" else jnp.int32)
        for name, rows in batch.items()
    }


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def model(mesh):
    return make_model(CONFIG, EXECUTION, mesh, 0)


def sums(model, mesh, batch, z_loss=0.0):
    objective = make_objective(NextTokenConfig(z_loss=z_loss), EXECUTION)
    with jax.set_mesh(mesh):
        loss, metrics = objective(model, arrays(batch), jax.random.key(0), {})
    return float(loss), {name: float(value) for name, value in metrics.items()}


def test_the_loss_is_the_masked_sum_that_numpy_computes_from_the_logits(model, mesh):
    batch = arrays(PACKED)
    with jax.set_mesh(mesh):
        logits = model(
            batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"]
        )
    logits = np.asarray(logits, np.float64)[0]
    log_z = np.log(np.exp(logits).sum(-1))
    target = logits[np.arange(6), PACKED["targets"][0]]
    mask = np.array(PACKED["loss_mask"][0])
    cross_entropy = ((log_z - target) * mask).sum()
    z_term = 1e-2 * (log_z**2 * mask).sum()

    loss, metrics = sums(model, mesh, PACKED, z_loss=1e-2)
    np.testing.assert_allclose(loss, cross_entropy + z_term, rtol=RTOL_F32)
    np.testing.assert_allclose(metrics["cross_entropy"], cross_entropy, rtol=RTOL_F32)
    np.testing.assert_allclose(metrics["z_loss"], z_term, rtol=RTOL_F32)
    assert metrics["tokens"] == 4


def test_packed_documents_have_the_summed_loss_of_the_same_documents_apart(model, mesh):
    packed, apart = sums(model, mesh, PACKED), sums(model, mesh, APART)
    np.testing.assert_allclose(packed[0], apart[0], rtol=RTOL_F32)
    assert packed[1]["tokens"] == apart[1]["tokens"] == 4


def test_the_loss_of_a_document_does_not_depend_on_its_neighbour(model, mesh):
    def second_alone(first_token):
        batch = {**PACKED, "tokens": [[first_token, *PACKED["tokens"][0][1:]]]}
        return sums(model, mesh, {**batch, "loss_mask": [[0, 0, 0, 0, 1, 0]]})[0]

    assert second_alone(3) == second_alone(20)


def test_a_batch_without_targets_is_zero_not_nan(model, mesh):
    loss, metrics = sums(model, mesh, {**PACKED, "loss_mask": [[0] * 6]}, z_loss=1e-2)
    assert loss == 0.0
    assert set(metrics.values()) == {0.0}
