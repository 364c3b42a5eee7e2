"""Small models opened for sampling. No tests here."""

import functools
import sys
from pathlib import Path

import jax

from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.inference.generator import Generator
from llama_jax.inference.sessions import Session
from llama_jax.interchange.loading import load_model
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.chat import make_chat_format

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("interchange", "cli")]

from in_memory import random_source
from scripted_models import CONFIG, scripted_source

BYTE = ByteTokenizer()


def session_of(source, *, chat=False, batch_size=8):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    execution = ExecutionConfig(param_dtype="float32", compute_dtype="float32", remat="none")
    model = load_model(source, execution, mesh)
    generator = Generator(model, BYTE, mesh, batch_size=batch_size)
    return Session(source, BYTE, generator, make_chat_format(BYTE) if chat else None)


@functools.cache
def random_session(seed=0):
    """Writes bytes of every kind, as no prompt's answer is like another's."""
    return session_of(random_source(CONFIG, seed=seed))


def scripted_session(*lines, chat=True):
    return session_of(scripted_source(*lines), chat=chat)
