"""Small models to generate with, and generation without a cache to hold it to. No tests here."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from llama_jax.config.model import ModelConfig, RopeConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.inference.generator import Generator
from llama_jax.models.init import make_model
from llama_jax.sharding.mesh import make_mesh
from llama_jax.sharding.rules import batch_sharding
from llama_jax.tokenizers.byte import ByteTokenizer

BYTE = ByteTokenizer()
F32 = ExecutionConfig(compute_dtype="float32")
# Grouped heads, a head_dim that is not D / N; big weights, so that every part matters.
CONFIG = ModelConfig(
    vocab_size=BYTE.vocab_size,
    embed_dim=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=48,
    max_seq_len=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    tie_embeddings=False,
    init_std=0.3,
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
PROMPTS = [[5, 6, 7], list(range(20)), [9], list(range(40, 57))]


def make(config=CONFIG, mesh=None, devices=1, execution=F32):
    made = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    return make_model(config, execution, made, 0), made


@functools.cache
def generator(config=CONFIG, mesh=None, devices=1, **options):
    """One for all tests of a kind, since each compiles its own programs."""
    model, made = make(config, mesh, devices)
    return Generator(model, BYTE, made, **options)


def full_logits(model, mesh, tokens_BT):
    """[B, T, V] by the forward pass that training uses."""
    graphdef, params = nnx.split(model)
    places_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)

    @jax.jit
    def run(params, tokens_BT, places_BT):
        return nnx.merge(graphdef, params)(
            tokens_BT, positions_BT=places_BT, segment_ids_BT=jax.numpy.ones_like(tokens_BT)
        )

    with jax.set_mesh(mesh):
        batch = jax.device_put((np.asarray(tokens_BT, np.int32), places_BT), batch_sharding(mesh))
        return np.asarray(run(params, *batch))


@functools.cache
def greedy(config, prompts, new_tokens):
    """Greedy continuations and their log-probabilities: a full forward pass for each token."""
    model, mesh = make(config)
    rows, logprobs = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    longest = max(map(len, rows)) + new_tokens
    for _ in range(new_tokens):
        tokens_BT = np.array([row + [0] * (longest - len(row)) for row in rows])
        logits_BTV = full_logits(model, mesh, tokens_BT).astype(np.float64)
        for row, logps, logits_TV in zip(rows, logprobs, logits_BTV, strict=True):
            logits_V = logits_TV[len(row) - 1]
            token = int(logits_V.argmax())
            logps.append(logits_V[token] - np.log(np.exp(logits_V - logits_V.max()).sum()))
            logps[-1] -= logits_V.max()
            row.append(token)
    return [row[-new_tokens:] for row in rows], logprobs


def saying(following, **options):
    """A generator over a model in which each token is followed by a fixed one.

    Embeddings are one-hot and the layers add nothing, so row i of the head is all that follows i.
    """
    V = BYTE.vocab_size
    config = dataclasses.replace(CONFIG, embed_dim=V, num_layers=1)
    model, mesh = make(config)
    state = nnx.state(model)
    for path, param in nnx.to_flat_state(state):
        name = str(path[-1])
        value = np.zeros(param.shape, np.float32)
        if name == "embedding":
            value = np.eye(V, dtype=np.float32)
        elif name == "scale":
            value = np.ones(param.shape, np.float32)
        elif name == "lm_head":
            for token in range(V):
                value[token, following(token) % V] = 1.0
        param.set_value(jax.device_put(value, param[...].sharding))
    nnx.update(model, state)
    return Generator(model, BYTE, mesh, **options)
