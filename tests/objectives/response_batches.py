"""Small models, batches of responses, and one call of an objective on any mesh. No tests here."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from llama_jax.config.model import ModelConfig, RopeConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.data.device import to_device
from llama_jax.models.init import make_model
from llama_jax.sharding.mesh import make_mesh

EXECUTION = ExecutionConfig(compute_dtype="float32", loss_chunk_size=5)
MODEL = ModelConfig(
    vocab_size=48,
    embed_dim=16,
    num_layers=1,  # nothing here depends on more, and each call compiles
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_seq_len=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    tie_embeddings=False,
    init_std=0.3,
)
SCALAR = dataclasses.replace(MODEL, head="scalar", tie_embeddings=True)
R = 4
CHOSEN, REJECTED, EDITED, MISMATCHED = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Response:
    """What follows a prompt; `tokens` ends with an end-of-turn mark."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    role: int = CHOSEN


@dataclasses.dataclass(frozen=True)
class Row:
    """Responses, and pairs of them by number: (chosen, rejected, strength)."""

    responses: tuple[Response, ...]
    pairs: tuple[tuple[int, int, int], ...] = ()


def lay_rows(rows, length, *, mask_end=False, last_only=False, gap=0):
    """A batch: each response a segment with its own copy of the prompt, `gap` places apart.

    `mask_end` leaves the end-of-turn mark out of what counts; `last_only` marks the place where
    the last token has been read, as for a reward model.
    """
    B = len(rows)
    names = ("tokens", "targets", "positions", "segment_ids", "response_ids")
    batch = {name: np.zeros((B, length), np.int32) for name in names}
    batch["loss_mask"] = np.zeros((B, length), np.float32)
    for name in ("chosen", "rejected", "strength", "roles"):
        batch[name] = np.zeros((B, R), np.int32)
    for b, row in enumerate(rows):
        start = gap
        for number, response in enumerate(row.responses, start=1):
            ids = (*response.prompt, *response.tokens)
            here = slice(start, start + len(ids))
            batch["tokens"][b, here] = ids
            batch["targets"][b, start : start + len(ids) - 1] = ids[1:]
            batch["positions"][b, here] = np.arange(len(ids))
            batch["segment_ids"][b, here] = number
            first, last = start + len(response.prompt) - 1, start + len(ids) - 1
            places = slice(last, last + 1) if last_only else slice(first, last)
            batch["response_ids"][b, places] = number
            batch["loss_mask"][b, places] = 1.0
            if mask_end:
                batch["loss_mask"][b, last - 1] = 0.0
            batch["roles"][b, number - 1] = response.role
            start = last + 1 + gap
        for place, (chosen, rejected, strength) in enumerate(row.pairs):
            batch["chosen"][b, place], batch["rejected"][b, place] = chosen, rejected
            batch["strength"][b, place] = strength
    return batch


def model_on(mesh, config=MODEL, seed=0):
    return make_model(config, EXECUTION, mesh, seed)


def mesh_of(config=None):
    config = config or MeshConfig(fsdp=1)
    return make_mesh(config, jax.devices()[: int(np.prod(dataclasses.astuple(config)))])


class Table(nnx.Module):
    """Stands for a model where attention has nothing to say: a token's row is what heads read.

    A fraction of a Llama's time to compile.
    """

    def __init__(self, seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        V, D = MODEL.vocab_size, MODEL.embed_dim
        self.rows = nnx.Param(jax.random.normal(keys[0], (V, D)))
        self.head = nnx.Param(jax.random.normal(keys[1], (D, V)))
        self.reward_head = nnx.Param(jax.random.normal(keys[2], (D,)))

    def hidden(self, tokens_BT, *, positions_BT, segment_ids_BT):
        # Places matter a little, so that a place that is mistaken for another is seen.
        return self.rows[...][tokens_BT] * (1.0 + 0.1 * positions_BT[..., None])

    def for_loss(self, x_BTD):
        return x_BTD, self.head[...]

    def rewards(self, x_BTD):
        return x_BTD @ self.reward_head[...]


def run_table(objective, batch, *, seed=0, frozen_seed=1):
    """Loss and sums of a `Table`, as floats."""
    frozen = {name: Table(frozen_seed) for name in objective.frozen}
    loss, sums = objective(Table(seed), jax.tree.map(np.asarray, batch), None, frozen)
    return float(loss), {name: float(value) for name, value in sums.items()}


def run(objective, batch, *, config=MODEL, mesh_config=None, seed=0, frozen_seed=1, teacher=None):
    """Loss, sums as floats, and gradients by path, of a Llama; frozen ones are of another seed."""
    mesh = mesh_of(mesh_config)
    names = dict.fromkeys(objective.frozen, (teacher or config, frozen_seed))
    models = {"": model_on(mesh, config, seed)} | {n: model_on(mesh, *a) for n, a in names.items()}
    parts = {name: nnx.split(model) for name, model in models.items()}

    def call(params, states, arrays):
        states = states | {"": params}
        merged = {name: nnx.merge(parts[name][0], state) for name, state in states.items()}
        return objective(merged.pop(""), arrays, jax.random.key(0), merged)

    with jax.set_mesh(mesh):
        states = {name: part[1] for name, part in parts.items()}
        step = jax.jit(jax.value_and_grad(call, has_aux=True))
        (loss, sums), grads = step(states.pop(""), states, to_device(batch, mesh))
    by_path = {".".join(map(str, p)): np.asarray(g[...]) for p, g in nnx.to_flat_state(grads)}
    return float(loss), {name: float(value) for name, value in sums.items()}, by_path


def assert_same_gradients(actual, expected, rtol=2e-5):
    assert set(actual) == set(expected)
    largest = max(np.abs(grad).max() for grad in expected.values())
    for name, grad in expected.items():
        np.testing.assert_allclose(actual[name], grad, atol=rtol * largest, err_msg=name)
