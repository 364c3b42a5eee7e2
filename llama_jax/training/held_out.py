"""Loss on the held-out part: weighted by token, and as bits a byte of its text."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.data.device import to_device
from llama_jax.data.rows import Batch
from llama_jax.metrics.compression import bits_per_byte
from llama_jax.training.step import JittedStep

# One pass over the held-out batches, each with the bytes of text of its targets.
HeldOutBatches = Callable[[], Iterator[tuple[Batch, float]]]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Cross entropy in nats a token, in bits a byte of text, and over how much of both."""

    loss: float
    bits_per_byte: float
    tokens: float
    text_bytes: float


def evaluate(params: Any, eval_step: JittedStep, batches: HeldOutBatches, mesh: Mesh) -> HeldOut:
    """The figures of `params` over one pass; sums are kept in float64 on the host.

    Every token that a document's ids predict counts, its end mark included; what the begin mark
    costs is nothing, for it is given.
    """
    nats = tokens = text_bytes = 0.0
    for batch, batch_bytes in batches():
        sums = jax.device_get(eval_step(params, to_device(batch, mesh)))
        nats += float(sums["cross_entropy"])
        tokens += float(sums["tokens"])
        text_bytes += batch_bytes
    loss = nats / max(tokens, 1.0)
    return HeldOut(loss, bits_per_byte(loss, tokens, max(text_bytes, 1.0)), tokens, text_bytes)
