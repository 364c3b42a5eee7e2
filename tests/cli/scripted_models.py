"""Llamas that say what is written here: the token after each token is fixed. No tests here."""

import dataclasses
import itertools
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from llama_jax.checkpoint.manager import Checkpoints
from llama_jax.config.files import load_run_config
from llama_jax.config.loading import to_table, to_toml
from llama_jax.config.model import ModelConfig, RopeConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.loading import load_model
from llama_jax.optim.optimizer import make_optimizer
from llama_jax.optim.schedule import make_schedule
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.training.state import init_state

sys.path.append(str(Path(__file__).parents[1] / "interchange"))

from in_memory import random_source

BYTE = ByteTokenizer()
CONFIG = ModelConfig(
    vocab_size=BYTE.vocab_size,
    embed_dim=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    mlp_dim=64,
    max_seq_len=512,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    tie_embeddings=False,
)


def scripted_source(*lines, generation=GenerationDefaults(), chat_template=None):  # noqa: B008
    """A model that goes through each line: each token is followed by the next one of its line.

    A line is a list of texts and names of special tokens; a token must not occur in two places.
    """
    source = random_source(CONFIG, generation=generation, chat_template=chat_template)
    arrays = source.arrays
    for name in arrays:
        # Without what attention and MLP add, a token's logits depend on that token alone.
        if name.endswith(("o_proj", "down_proj")):
            arrays[name] = np.zeros_like(arrays[name])
    arrays["final_norm.scale"] = np.ones_like(arrays["final_norm.scale"])
    embedding = np.random.default_rng(1).choice([-1.0, 1.0], arrays["embedding"].shape)
    arrays["embedding"] = embedding.astype(np.float32)
    head = np.zeros_like(arrays["lm_head"])
    for line in lines:
        ids = [i for part in line for i in ids_of(part)]
        for current, following in itertools.pairwise(ids):
            head[following] += embedding[current]
    arrays["lm_head"] = head.astype(np.float32)
    return source


def ids_of(part):
    return [BYTE.special[part]] if part in BYTE.special else list(part.encode())


def write_run(source, folder, run="tiny", settings=()):
    """A run's folder with one checkpoint of the source's weights, as training leaves it."""
    config = dataclasses.replace(load_run_config(run, settings), model=source.config)
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(to_table(config)))
    BYTE.save(folder / "tokenizer")
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    schedule = make_schedule(config.schedule, config.training.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    model = load_model(source, ExecutionConfig(), mesh)
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints, jax.set_mesh(mesh):
        state = init_state(nnx.state(model), optimizer, jax.random.key(0))
        checkpoints.save(1, state, {})
