"""Figures of whole responses from figures of places, and of pairs from those of responses.

Places are found by the batch's own arrays alone (see `data.rows`), so padding, packing and the
order of a row don't matter. Sums are written as masks and reductions, which any layout of the batch
allows: what a row's length is split over is added up by the compiler.

Letters: B batch, T length, R responses that a row has room for, and pairs of them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.data.fields import BY_RESPONSE
from llama_jax.losses.token_logps import token_logps
from llama_jax.sharding.rules import lay_out
from llama_jax.sharding.zigzag import to_zigzag

Batch = dict[str, jax.Array]


def in_hidden_order(batch: Batch) -> Batch:
    """The batch in the order of `Llama.hidden`: places moved as it asks, responses left alone."""
    return {
        name: lay_out(array, ("batch", None)) if name in BY_RESPONSE else to_zigzag(array)
        for name, array in batch.items()
    }


def hidden(model: Any, batch: Batch) -> jax.Array:
    """[B, T, D], what the model's head reads of a batch in hidden order."""
    return model.hidden(
        batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"]
    )


def target_logps(model: Any, batch: Batch, chunk_size: int) -> jax.Array:
    """float32 [B, T], log p(target) at each place of a batch in hidden order."""
    x_BTD, head_DV = model.for_loss(hidden(model, batch))
    return token_logps(x_BTD, head_DV, batch["targets"], chunk_size=chunk_size)


def response_logps(model: Any, batch: Batch, chunk_size: int) -> jax.Array:
    """float32 [B, R], the summed log-probability of each response's counted places.

    Of a batch in natural order: what `reference_logps` holds, of the model that is the reference.
    """
    batch = in_hidden_order(batch)
    logps_BT = target_logps(model, batch, chunk_size)
    return sums_by_response(logps_BT, counted_ids(batch), batch["chosen"].shape[1])


def counted_ids(batch: Batch) -> jax.Array:
    """int32 [B, T]: the response that a place counts for by `loss_mask`, or 0."""
    return jnp.where(batch["loss_mask"] > 0, batch["response_ids"], 0)


def sums_by_response(values_BT: jax.Array, response_ids_BT: jax.Array, count: int) -> jax.Array:
    """[B, R]: for each of `count` responses of a row the sum of its places' values.

    A value at a place of no response may be anything, NaN included.
    """
    ids_R = jnp.arange(1, count + 1, dtype=response_ids_BT.dtype)
    is_in_BTR = response_ids_BT[:, :, None] == ids_R
    return jnp.where(is_in_BTR, values_BT[:, :, None], 0.0).sum(axis=1)


def of_numbered(values_BR: jax.Array, numbers_BR: jax.Array) -> jax.Array:
    """The value of the response of each number, counted from 1 within its row; 0 of number 0."""
    ids_R = jnp.arange(1, values_BR.shape[1] + 1, dtype=numbers_BR.dtype)
    is_it_BRR = numbers_BR[:, :, None] == ids_R
    return jnp.where(is_it_BRR, values_BR[:, None, :], 0.0).sum(axis=2)


def sum_where(mask: jax.Array, values: jax.Array) -> jax.Array:
    """The float32 sum of the values where the mask holds."""
    return jnp.where(mask, values, 0.0).sum(dtype=jnp.float32)
