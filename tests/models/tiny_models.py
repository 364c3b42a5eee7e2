"""Small configs, batches and models that the tests of this folder share."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from llama_jax.config.model import Llama3Scaling, ModelConfig, RopeConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.models.init import make_model
from llama_jax.models.llama import Llama
from llama_jax.sharding.mesh import make_mesh

F32 = ExecutionConfig(compute_dtype="float32")

# Grouped heads, a head_dim that is not D / N, an untied head, all three bands of llama3 scaling.
CONFIG = ModelConfig(
    vocab_size=64,
    embed_dim=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=48,
    max_seq_len=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, scaling=Llama3Scaling(factor=4.0, original_max_seq_len=64)),
    tie_embeddings=False,
    init_std=0.3,  # larger than in training, so that every part matters to the output
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)

Batch = dict[str, Any]


def make(
    config: ModelConfig = CONFIG,
    execution: ExecutionConfig = F32,
    mesh: MeshConfig | None = None,
    devices: int = 1,
    seed: int = 0,
) -> tuple[Llama, jax.sharding.Mesh]:
    mesh_of = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    return make_model(config, execution, mesh_of, seed), mesh_of


def packed_batch(B: int, T: int, vocab_size: int = 64, seed: int = 0) -> Batch:
    """Rows of two documents and some padding; positions restart."""
    rng = np.random.default_rng(seed)
    segments_BT, positions_BT = np.zeros((2, B, T), np.int32)
    for row, places in zip(segments_BT, positions_BT, strict=True):
        first, end = np.sort(rng.integers(1, T + 1, 2))
        row[:first], row[first:end] = 1, 2
        places[:first], places[first:end] = np.arange(first), np.arange(end - first)
    tokens_BT = rng.integers(0, vocab_size, (B, T)).astype(np.int32)
    return {"tokens": tokens_BT, "positions": positions_BT, "segment_ids": segments_BT}


def whole_batch(B: int, T: int, vocab_size: int = 64, seed: int = 0) -> Batch:
    """Rows of one document."""
    tokens_BT = np.random.default_rng(seed).integers(0, vocab_size, (B, T)).astype(np.int32)
    places_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    return {"tokens": tokens_BT, "positions": places_BT, "segment_ids": np.ones_like(places_BT)}


def logits(model: Llama, mesh: jax.sharding.Mesh, batch: Batch) -> np.ndarray:
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params: nnx.State, batch: Batch) -> jax.Array:
        return forward(nnx.merge(graphdef, params), batch)

    with jax.set_mesh(mesh):
        return np.asarray(run(params, batch))


def forward(model: Llama, batch: Batch) -> jax.Array:
    return model(
        batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"]
    )


def logits_loss_grads(
    model: Llama, mesh: jax.sharding.Mesh, batch: Batch
) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits, a loss that every logit of real tokens enters, and its gradients by path."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params: nnx.State, batch: Batch) -> Any:
        def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            logits_BTV = forward(nnx.merge(graphdef, params), batch)
            real_BT = batch["segment_ids"] != 0
            terms_BT = jax.nn.logsumexp(logits_BTV, axis=-1) ** 2 * real_BT
            return terms_BT.sum() / real_BT.sum(), logits_BTV

        return jax.value_and_grad(loss, has_aux=True)(params)

    with jax.set_mesh(mesh):
        (value, logits_BTV), grads = run(params, batch)
    by_path = {
        ".".join(map(str, path)): np.asarray(grad[...]) for path, grad in nnx.to_flat_state(grads)
    }
    return np.asarray(logits_BTV), float(value), by_path


def loss_and_grads(
    model: Llama, mesh: jax.sharding.Mesh, batch: Batch
) -> tuple[float, dict[str, np.ndarray]]:
    """The last two of `logits_loss_grads`."""
    return logits_loss_grads(model, mesh, batch)[1:]


def params_of(model: Llama) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(param[...])
        for path, param in nnx.to_flat_state(nnx.state(model))
    }
