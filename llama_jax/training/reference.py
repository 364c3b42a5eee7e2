"""What other models say of a run's data, computed once and stored beside it.

The log-probability of each response under the model that the run starts from, for preferences; a
teacher's likeliest tokens at every place, for distillation. One forward pass over each source.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama_jax.config.run import RunConfig
from llama_jax.data.attached import WithReferenceLogps
from llama_jax.data.device import host_rows, to_device
from llama_jax.data.documents import DataError, Documents
from llama_jax.data.ordered import ordered_batches
from llama_jax.objectives.responses import response_logps
from llama_jax.sharding.rules import lay_out
from llama_jax.training.distributed import wait_for_all
from llama_jax.training.inputs import PARTS, Inputs, Say
from llama_jax.training.networks import Networks

FILE = "reference_logps.npz"


@dataclasses.dataclass(frozen=True)
class Reference:
    """The model that is asked: its graph, and how to get its parameters, which may take a while.

    Attributes:
      params: gives those that a step changes, as they are at step 0, and those that it only reads.
      identity: tells it from other models.
      begins: whether the run is at step 0, where what is stored may be another model's: of an
        attempt that began with that and saved nothing.
    """

    networks: Networks
    params: Callable[[], tuple[nnx.State, Mapping[str, nnx.State]]]
    identity: Callable[[], str]
    begins: bool


def attach_reference(
    config: RunConfig, inputs: Inputs, reference: Reference, mesh: Mesh, folder: Path, say: Say
) -> Inputs:
    """The inputs, each source with log-probabilities under the reference.

    Those found in `folder` are used where they are of the same examples, and in a run that begins
    of the same model: one that goes on reads no other weights again.

    Raises:
      DataError: a response without a finite log-probability.
    """
    found = {}
    wanted = reference.identity() if reference.begins else None
    for part in PARTS:
        names = [source.name for source in getattr(config.data, part)]
        sources = []
        for name, documents in zip(names, getattr(inputs, part), strict=True):
            path = folder / "data" / part / name / FILE
            logps_ER = _stored(path, documents, wanted)
            if logps_ER is None:
                count = len(documents.lengths)
                say(f"{name}: log-probabilities of {count} examples under the reference")
                logps_ER = _reference_logps(config, documents, reference, mesh)
                if jax.process_index() == 0:
                    _store(path, documents, logps_ER, reference.identity())
                wait_for_all(f"the reference's log-probabilities of {name} are stored")
            sources.append(WithReferenceLogps(documents, logps_ER))
        found[part] = sources
    return dataclasses.replace(inputs, **found)


def _reference_logps(
    config: RunConfig, documents: Any, reference: Reference, mesh: Mesh
) -> np.ndarray:
    """float32 [examples, R]; 0 where an example has no such response."""
    chunk_size = config.execution.loss_chunk_size
    logps_ER = np.zeros((len(documents.lengths), config.data.responses_per_row), np.float32)

    @jax.jit
    def ask(params: nnx.State, frozen: Mapping[str, nnx.State], batch: Any) -> jax.Array:
        model = reference.networks.model(params, frozen)
        return lay_out(response_logps(model, batch, chunk_size), (None, None))

    weights, rows = reference.params(), host_rows(mesh, config.data.batch_size).tolist()
    for held in ordered_batches(config.data, documents, rows=rows):
        logps_BR = np.asarray(jax.device_get(ask(*weights, to_device(held.batch, mesh))))
        is_one_BR = held.responses > 0
        logps_ER[held.examples[is_one_BR], held.responses[is_one_BR] - 1] = logps_BR[is_one_BR]
    return logps_ER


def _stored(path: Path, documents: Documents, reference: str | None) -> np.ndarray | None:
    """Those at `path`; None where there are none, or of another model than `reference`."""
    if not path.exists():
        return None
    with np.load(path) as found:
        if str(found["examples"]) != documents.fingerprint:
            raise DataError(f"{path} is of other examples; delete it or use another run directory")
        same = reference is None or str(found.get("reference")) == reference
        return found["logps_ER"] if same else None


def _store(path: Path, documents: Documents, logps_ER: np.ndarray, reference: str) -> None:
    temporary = path.with_suffix(".new.npz")
    np.savez(temporary, logps_ER=logps_ER, examples=documents.fingerprint, reference=reference)
    temporary.replace(path)
