"""A Llama of two layers, its batches, and one call to train it on any mesh. No tests here."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from llama_jax.config.model import ModelConfig, RopeConfig
from llama_jax.config.run import (
    AdamWConfig,
    ExecutionConfig,
    MeshConfig,
    NextTokenConfig,
    ScheduleConfig,
    TrainingConfig,
)
from llama_jax.models.init import abstract_model, make_model
from llama_jax.objectives.objective import make_objective
from llama_jax.optim.optimizer import make_optimizer
from llama_jax.optim.schedule import make_schedule
from llama_jax.sharding.mesh import make_mesh
from llama_jax.sharding.rules import batch_sharding
from llama_jax.training.networks import Networks
from llama_jax.training.state import init_state
from llama_jax.training.step import JittedStep, make_train_step

MODEL = ModelConfig(
    vocab_size=64,
    embed_dim=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    max_seq_len=32,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    tie_embeddings=True,
)
EXECUTION = ExecutionConfig(compute_dtype="float32", loss_chunk_size=16)
SCHEDULE = ScheduleConfig(peak=1e-2, warmup_steps=2)
ONE = MeshConfig(data=1, fsdp=1)
STEPS = 20


@dataclasses.dataclass
class Trainer:
    """A state and the step that moves it."""

    mesh: jax.sharding.Mesh
    graphdef: nnx.GraphDef
    objective: object
    state: object
    step: JittedStep

    def train(self, batches):
        """Runs the batches; the metrics of each as floats."""
        history = []
        with jax.set_mesh(self.mesh):
            for batch in batches:
                self.state, metrics = self.step(self.state, place(batch, self.mesh))
                history.append({name: float(value) for name, value in metrics.items()})
        return history


def make_trainer(
    mesh_config=ONE,
    *,
    microbatches=1,
    clip_norm=1.0,
    optimizer=None,
    objective=None,
    schedule=None,
    execution=EXECUTION,
    gradient_dtype=None,
):
    devices = None if -1 in dataclasses.astuple(mesh_config) else _first_devices(mesh_config)
    mesh = make_mesh(mesh_config, devices)
    config = TrainingConfig(steps=STEPS, microbatches=microbatches, clip_norm=clip_norm)
    rates = make_schedule(schedule or SCHEDULE, STEPS)
    objective = objective or make_objective(NextTokenConfig(z_loss=1e-4), execution)
    transform = make_optimizer(optimizer or AdamWConfig(), rates)
    graphdef, layout = abstract_model(MODEL, execution, mesh)
    params = jax.tree.map(lambda a, value: jax.device_put(value, a.sharding), layout, _weights())
    return Trainer(
        mesh,
        graphdef,
        objective,
        init_state(params, transform, jax.random.key(7)),
        make_train_step(
            Networks(graphdef),
            objective,
            transform,
            rates,
            config,
            gradient_dtype=gradient_dtype or execution.compute_dtype,
        ),
    )


@functools.cache
def _weights():
    """Initial parameters on the host: made once, for compiling the draw takes seconds."""
    mesh = make_mesh(ONE, _first_devices(ONE))
    return to_numpy(nnx.split(make_model(MODEL, EXECUTION, mesh, 0))[1])


def make_batch(seed, rows=8, length=16, masked=0.3):
    """Random ids in rows of two documents each, with some targets masked."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, MODEL.vocab_size, (rows, length + 1), dtype=np.int32)
    place_in_row = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    second = place_in_row >= rng.integers(2, length, (rows, 1))
    start = np.where(second, second.argmax(axis=1)[:, None], 0)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_mask": (rng.random((rows, length)) >= masked).astype(np.float32),
        "positions": (place_in_row - start).astype(np.int32),
        "segment_ids": (second + 1).astype(np.int32),
    }


def place(batch, mesh):
    return {name: jax.device_put(array, batch_sharding(mesh)) for name, array in batch.items()}


def to_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def _first_devices(mesh_config):
    return jax.devices()[: int(np.prod(dataclasses.astuple(mesh_config)))]
