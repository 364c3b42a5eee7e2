"""Next-token cross entropy over a large vocabulary, a chunk of tokens at a time.

The float32 logits of all tokens never exist together: each chunk's are made, reduced to a loss and
(when differentiated) to gradients, and dropped. The gradient is computed in the forward pass,
while the chunk's logits are there, so the largest matmul of a small model is never done twice.
Owns the loss, its z term and its gradient; what is a target is the data's business, and dividing
by the number of targets is the step's.

On a mesh the arrays' own layouts say who does what; see `chunks`. The head's gradient is complete
where its columns are, and never whole on any device.

Letters: B batch, T length, D model width, V vocabulary; C tokens of a chunk, M chunks, n tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from llama_jax.losses.chunks import (
    Layout,
    Wanted,
    gather,
    into_chunks,
    lay_out_head,
    lay_out_tokens,
    one_hot,
    out_of_chunks,
    own,
    placement,
    pmax,
    psum,
    scatter,
    varying,
    weighted,
)

Metrics = dict[str, jax.Array]


class _Totals(NamedTuple):
    """Sums over tokens, float32 scalars."""

    cross_entropy: jax.Array
    z_loss: jax.Array
    tokens: jax.Array
    correct: jax.Array


class _Gradients(NamedTuple):
    """Derivatives of the summed loss; float32 for the head, which sums over every token.

    A head whose gradient nothing asks for has a scalar.
    """

    x: jax.Array
    head: jax.Array
    weights: jax.Array


def chunked_cross_entropy(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float,
    chunk_size: int,
) -> tuple[jax.Array, Metrics]:
    """Sum over tokens of `weight * (-log p(target) + z_loss * log(Z)^2)`.

    The z term is PaLM's (arXiv 2204.02311, section 5); Z is the softmax's denominator. A token of
    weight 0 adds nothing, whatever its logits.

    Args:
      x_BTD: what the head is applied to; float32 or bfloat16. Matmuls take operands as they come
        and give float32.
      head_DV: the head, in any float dtype; under a mesh it may be split over V, not over D, and
        over V also by axes that split the tokens.
      targets_BT: ids in [0, V).
      weights_BT: float32.
      z_loss: the z term's coefficient.
      chunk_size: tokens a chunk, on each device.

    Returns:
      The float32 sum, differentiable in x, head and weights, and sums without gradient:
      `cross_entropy` (without the z term), `z_loss`, `tokens` (the weights) and `correct` (weights
      of the tokens whose target has the largest logit).
    """
    place = placement(x_BTD, head_DV)
    x_BTD, targets_BT, weights_BT = (
        lay_out_tokens(array, place) for array in (x_BTD, targets_BT, weights_BT)
    )
    head_DV = lay_out_head(head_DV, place)
    result: Any = _cross_entropy(x_BTD, head_DV, targets_BT, weights_BT, z_loss, chunk_size)
    loss, totals = result
    return loss, jax.lax.stop_gradient(totals._asdict())


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(x_BTD, head_DV, targets_BT, weights_BT, z_loss, chunk_size):  # noqa: ANN001, ANN202
    totals, _ = _on_shards(
        x_BTD, head_DV, targets_BT, weights_BT, z_loss, chunk_size, wanted="none"
    )
    return totals.cross_entropy + totals.z_loss, totals


def _forward(x, head, targets, weights, z_loss, chunk_size):  # noqa: ANN001, ANN202
    # A frozen head's gradient, a third of what the head costs, isn't made.
    wanted = "all" if head.perturbed else "tokens"
    totals, gradients = _on_shards(
        x.value, head.value, targets.value, weights.value, z_loss, chunk_size, wanted=wanted
    )
    return (totals.cross_entropy + totals.z_loss, totals), (gradients, head.value)


def _backward(z_loss, chunk_size, residuals, cotangents):  # noqa: ANN001, ANN202
    del z_loss, chunk_size
    gradients, head_DV = residuals
    scale = cotangents[0]  # the totals' cotangents are zero: they carry no gradient
    if isinstance(scale, SymbolicZero):
        return None, None, None, None
    x_BTD, weights_BT = gradients.x, gradients.weights
    return (
        (scale * x_BTD).astype(x_BTD.dtype),
        (scale * gradients.head).astype(head_DV.dtype) if gradients.head.ndim else None,
        None,
        scale * weights_BT,
    )


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_shards(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    chunk_size: int,
    *,
    wanted: Wanted,
) -> tuple[_Totals, _Gradients | None]:
    """`_local` on each device's part of the arrays, as their own shardings split them."""
    arrays = (x_BTD, head_DV, targets_BT, weights_BT)
    options = {"z_loss": z_loss, "chunk_size": chunk_size, "wanted": wanted}
    place = placement(x_BTD, head_DV)
    if place.mesh is None:
        return _local(*arrays, layout=place.layout, **options)
    x_spec = PartitionSpec(*place.tokens, None)
    head_spec = place.head if wanted == "all" else PartitionSpec()
    gradient_specs: Any = (x_spec, head_spec, place.tokens)
    scalars: Any = [PartitionSpec()] * 4
    return jax.shard_map(
        functools.partial(_local, layout=place.layout, **options),
        mesh=place.mesh,
        in_specs=(x_spec, place.head, place.tokens, place.tokens),
        out_specs=(_Totals(*scalars), None if wanted == "none" else _Gradients(*gradient_specs)),
    )(*arrays)


def _local(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    layout: Layout,
    z_loss: float,
    chunk_size: int,
    wanted: Wanted,
) -> tuple[_Totals, _Gradients | None]:
    """The tokens of one device in chunks; totals and gradients are summed over the mesh."""
    chunks = tuple(into_chunks(array, chunk_size) for array in (x_BTD, targets_BT, weights_BT))
    chunk = functools.partial(_chunk, head_DV=head_DV, layout=layout, z_loss=z_loss, wanted=wanted)
    totals, dhead_VD, per_token = _accumulate(chunk, chunks, head_DV, layout, wanted)
    totals = jax.tree.map(lambda total: psum(total, layout.token_axes), totals)
    if wanted == "none":
        return totals, None
    dx_BTD, dweights_BT = (
        out_of_chunks(array, like.shape)
        for array, like in zip(per_token, (x_BTD, weights_BT), strict=True)
    )
    # A replicated head's gradient is the sum over the devices that hold other tokens; a head
    # gathered for use is scattered again by the transpose of that gather.
    dhead_DV = jnp.zeros(()) if dhead_VD is None else psum(dhead_VD, layout.other_token_axes).T
    return totals, _Gradients(dx_BTD, dhead_DV, dweights_BT)


def _accumulate(
    chunk: Callable[..., Any],
    chunks: tuple[jax.Array, ...],
    head_DV: jax.Array,
    layout: Layout,
    wanted: Wanted,
) -> tuple[_Totals, Any, Any]:
    """Runs `chunk` over the chunks: totals and head gradient summed, token gradients stacked."""

    def body(carry, inputs):  # noqa: ANN001, ANN202
        totals, dhead_VD, per_token = chunk(*inputs)
        return jax.tree.map(jnp.add, carry, (totals, dhead_VD)), per_token

    if chunks[0].shape[0] == 1:
        totals, dhead_VD, per_token = chunk(*(array[0] for array in chunks))
        return totals, dhead_VD, per_token
    zero = varying(jnp.zeros((), jnp.float32), layout.token_axes)
    dhead_VD = None
    if wanted == "all":
        dhead_VD = jnp.zeros(head_DV.shape[::-1], jnp.float32)
        dhead_VD = varying(dhead_VD, layout.token_axes + layout.other_vocab_axes)
    (totals, dhead_VD), per_token = jax.lax.scan(body, (_Totals(*[zero] * 4), dhead_VD), chunks)
    return totals, dhead_VD, per_token


def _chunk(
    x_CD: jax.Array,
    targets_C: jax.Array,
    weights_C: jax.Array,
    *,
    head_DV: jax.Array,
    layout: Layout,
    z_loss: float,
    wanted: Wanted,
) -> tuple[_Totals, jax.Array | None, tuple[jax.Array, jax.Array] | None]:
    """One chunk's totals, head gradient [V, D] and per-token gradients ([C, D] and [C])."""
    own_targets_C, own_weights_C = targets_C, weights_C
    x_CD, targets_C, weights_C = (gather(y, layout) for y in (x_CD, targets_C, weights_C))
    # Asking the matmul for float32 keeps the sum over D, and so the loss, out of bfloat16.
    logits_CV = jnp.einsum("CD,DV->CV", x_CD, head_DV, preferred_element_type=jnp.float32)
    max_C = pmax(logits_CV.max(axis=1), layout.vocab_axes)
    exp_CV = jnp.exp(logits_CV - max_C[:, None])
    sum_C = psum(exp_CV.sum(axis=1), layout.vocab_axes)
    log_z_C = max_C + jnp.log(sum_C)
    hit_CV = one_hot(targets_C, logits_CV.shape[1], layout)
    target_C = psum(jnp.where(hit_CV, logits_CV, 0.0).sum(axis=1), layout.vocab_axes)

    count = own_targets_C.shape[0]
    own_log_z_C, own_target_C, own_max_C = (
        own(y, count, layout) for y in (log_z_C, target_C, max_C)
    )
    cross_entropy_C, z_C = own_log_z_C - own_target_C, z_loss * own_log_z_C**2
    totals = _Totals(
        cross_entropy=weighted(own_weights_C, cross_entropy_C),
        z_loss=weighted(own_weights_C, z_C),
        tokens=own_weights_C.sum(),
        correct=weighted(own_weights_C, (own_target_C >= own_max_C).astype(jnp.float32)),
    )
    if wanted == "none":
        return totals, None, None

    # d/dlogits of -log p is softmax - onehot; of z_loss * log_z^2, 2 * z_loss * log_z * softmax.
    softmax_scale_C = weights_C * (1.0 + 2.0 * z_loss * log_z_C) / sum_C
    dlogits_CV = exp_CV * softmax_scale_C[:, None] - jnp.where(hit_CV, weights_C[:, None], 0.0)
    dlogits_CV = dlogits_CV.astype(x_CD.dtype)
    dx_CD = jnp.einsum("CV,DV->CD", dlogits_CV, head_DV, preferred_element_type=jnp.float32)
    # Made as [V, D]: XLA's CPU backend takes 1.7 times as long for [D, V], and a tied head wants
    # its gradient so anyway.
    dhead_VD = None
    if wanted == "all":
        dhead_VD = jnp.einsum("CD,CV->VD", x_CD, dlogits_CV, preferred_element_type=jnp.float32)
    # Sent in x's dtype, which is what it ends in: half the bytes.
    dx_CD = scatter(dx_CD.astype(x_CD.dtype), layout)
    return totals, dhead_VD, (dx_CD, cross_entropy_C + z_C)
