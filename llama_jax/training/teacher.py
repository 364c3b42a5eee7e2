"""A distillation run's teacher: opened, checked against the student, asked once if it is stored."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import DistillConfig, RunConfig
from llama_jax.data.attached import TeacherStore, WithTeacher, open_teacher_store
from llama_jax.data.device import host_rows, to_device
from llama_jax.data.documents import Documents
from llama_jax.data.ordered import OrderedBatch, ordered_batches
from llama_jax.interchange.fingerprints import model_fingerprint
from llama_jax.interchange.loading import load_model
from llama_jax.models.llama import ACT, Llama
from llama_jax.objectives.responses import hidden, in_hidden_order
from llama_jax.sharding.rules import lay_out
from llama_jax.sharding.zigzag import from_zigzag
from llama_jax.tokenizers import Tokenizer
from llama_jax.training.distributed import wait_for_all
from llama_jax.training.inputs import PARTS, Inputs, Say
from llama_jax.training.networks import open_teacher, stored_as

# Places whose logits are held at once, a row.
_CHUNK = 256
# Progress is noted after this many batches.
_NOTED_EVERY = 50


def check_teacher(config: RunConfig, tokenizer: Tokenizer) -> None:
    """See to it that the teacher reads the same ids as the student.

    Raises:
      ConfigError: another tokenizer, or a vocabulary of another size.
    """
    if not isinstance(config.objective, DistillConfig):
        return
    source = open_teacher(config.objective)
    theirs = source.load_tokenizer()
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"{source.path} has another tokenizer ({theirs.vocab_size} tokens, fingerprint "
            f"{theirs.fingerprint}) than the run ({tokenizer.vocab_size}, {tokenizer.fingerprint})",
            key="objective.path",
        )
    if source.config.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"the teacher's vocabulary has {source.config.vocab_size} rows, the student's "
            f"{config.model.vocab_size}",
            key="model.vocab_size",
        )


def load_teacher(config: RunConfig, mesh: Mesh) -> Llama:
    """The teacher on the mesh, in the compute dtype."""
    assert isinstance(config.objective, DistillConfig)
    execution = dataclasses.replace(stored_as(config), param_dtype=config.execution.compute_dtype)
    return load_model(open_teacher(config.objective), execution, mesh)


def attach_teacher(config: RunConfig, inputs: Inputs, mesh: Mesh, folder: Path, say: Say) -> Inputs:
    """The inputs, each source with the teacher's likeliest tokens, which are computed once.

    A computation that was cut off goes on where it was.

    Raises:
      DataError: what is stored is another teacher's or of other data.
    """
    objective = config.objective
    assert isinstance(objective, DistillConfig)
    teacher: Llama | None = None
    identity = model_fingerprint(open_teacher(objective))
    found: dict[str, Any] = {}
    for part in PARTS:
        sources = []
        for source, documents in zip(
            getattr(config.data, part), getattr(inputs, part), strict=True
        ):
            place = folder / "data" / part / source.name / "teacher"
            # Process 0 begins the store, and the others find it.
            store = None
            if jax.process_index() == 0:
                store = _open(place, documents, identity, objective)
            wait_for_all(f"the store of the teacher's tokens for {source.name} is there")
            store = store or _open(place, documents, identity, objective)
            if store.next_batch is not None:
                teacher = teacher or load_teacher(config, mesh)
                say(f"{source.name}: the teacher's likeliest tokens, from batch {store.next_batch}")
                _ask(config, teacher, documents, store, mesh)
                store = _open(place, documents, identity, objective)
            sources.append(WithTeacher(documents, store))
        found[part] = sources
    return dataclasses.replace(inputs, **found)


def _open(
    place: Path, documents: Documents, identity: str, objective: DistillConfig
) -> TeacherStore:
    return open_teacher_store(place, documents, teacher=identity, top_k=objective.stored_tokens)


def _ask(
    config: RunConfig, teacher: Llama, documents: Documents, store: TeacherStore, mesh: Mesh
) -> None:
    graphdef, params = nnx.split(teacher)
    rows = host_rows(mesh, config.data.batch_size).tolist()

    @jax.jit
    def ask(params: nnx.State, batch: Any) -> tuple[jax.Array, jax.Array]:
        return likeliest(nnx.merge(graphdef, params), batch, store.top_k)

    start = store.next_batch or 0
    writes = jax.process_index() == 0
    for number, held in enumerate(
        ordered_batches(config.data, documents, rows=rows, start=start), start + 1
    ):
        ids_BTC, logps_BTC = jax.device_get(ask(params, to_device(held.batch, mesh)))
        if writes:
            _write(store, held, np.asarray(ids_BTC), np.asarray(logps_BTC))
            if number % _NOTED_EVERY == 0:
                store.note(number)
    if writes:
        store.note(None)
    wait_for_all("the teacher's tokens are stored")


def _write(
    store: TeacherStore, held: OrderedBatch, ids_BTC: np.ndarray, logps_BTC: np.ndarray
) -> None:
    for ids_TC, logps_TC, pieces in zip(ids_BTC, logps_BTC, held.pieces, strict=True):
        place = 0
        for piece in pieces:
            here = slice(place, place + piece.stop - piece.start)
            store.write(piece, ids_TC[here], logps_TC[here])
            place = here.stop


def likeliest(model: Llama, batch: Any, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` likeliest next tokens at each place and their log-probabilities, [B, T, C].

    Replicated: every process gets all of them.
    """
    x_BTD = hidden(model, in_hidden_order(batch))
    x_BTD = lay_out(from_zigzag(lay_out(x_BTD, ACT), ACT), ("batch", None, None))
    chunk = next(size for size in range(min(_CHUNK, x_BTD.shape[1]), 0, -1)
                 if x_BTD.shape[1] % size == 0)  # fmt: skip
    ids, logps = [], []
    for part_BtD in jnp.split(x_BTD, x_BTD.shape[1] // chunk, axis=1):
        logits_BtV = lay_out(model.logits(part_BtD), ("batch", None, None))
        top, top_ids = jax.lax.top_k(logits_BtV, count)
        ids.append(top_ids)
        logps.append(top - jax.nn.logsumexp(logits_BtV, axis=-1, keepdims=True))
    whole = (None, None, None)
    return (
        lay_out(jnp.concatenate(ids, axis=1), whole).astype(jnp.int32),
        lay_out(jnp.concatenate(logps, axis=1), whole),
    )
