"""Log-probabilities of targets over a large vocabulary, a chunk of tokens at a time.

As `cross_entropy`, but a figure a token and not a sum: what each token's gradient is multiplied by
is known only in the backward pass, which therefore makes the chunk's logits once more. No float32
logits of all tokens exist in either.

Letters: B batch, T length, D model width, V vocabulary; C tokens of a chunk, M chunks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from llama_jax.losses.chunks import (
    Layout,
    Placement,
    gather,
    into_chunks,
    lay_out_head,
    lay_out_tokens,
    log_z,
    one_hot,
    out_of_chunks,
    own,
    placement,
    psum,
    scatter,
    varying,
)


def token_logps(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, chunk_size: int
) -> jax.Array:
    """float32 [B, T]: log p(target) at each place, laid out as the targets are.

    Differentiable in x and head. A place whose result is multiplied by 0 later adds nothing to any
    gradient, whatever its logits, as long as its cotangent is 0: select it away (`jnp.where`), for
    what its value may be is inf or NaN.

    Args:
      x_BTD: what the head is applied to; float32 or bfloat16. Matmuls take operands as they come
        and give float32.
      head_DV: the head, in any float dtype; under a mesh it may be split over V, not over D, and
        over V also by axes that split the tokens.
      targets_BT: ids in [0, V).
      chunk_size: tokens a chunk, on each device.
    """
    wanted = jax.typeof(targets_BT).sharding
    place = placement(x_BTD, head_DV)
    logps_BT: Any = _token_logps(
        lay_out_tokens(x_BTD, place),
        lay_out_head(head_DV, place),
        lay_out_tokens(targets_BT, place),
        chunk_size,
    )
    return logps_BT if wanted.mesh.empty else jax.sharding.reshard(logps_BT, wanted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_logps(x_BTD, head_DV, targets_BT, chunk_size):  # noqa: ANN001, ANN202
    return _logps_and_saved(x_BTD, head_DV, targets_BT, chunk_size)[0]


def _forward(x, head, targets, chunk_size):  # noqa: ANN001, ANN202
    # A frozen head's gradient, a third of what the head costs, isn't made. An array tells, not its
    # absence: JAX may trace this for several sets of gradients, and remembers the last structure.
    wanted = jnp.zeros((0,) if head.perturbed else ())
    logps_BT, saved = _logps_and_saved(x.value, head.value, targets.value, chunk_size)
    return logps_BT, (saved, wanted)


def _logps_and_saved(x_BTD, head_DV, targets_BT, chunk_size):  # noqa: ANN001, ANN202
    place = placement(x_BTD, head_DV)
    run = _on_shards(
        functools.partial(_local_forward, layout=place.layout, chunk_size=chunk_size),
        place,
        (_TOKENS, _TOKENS),
        (_X, _HEAD, _TOKENS),
    )
    logps_BT, log_z_BT = run(x_BTD, head_DV, targets_BT)
    return logps_BT, (x_BTD, head_DV, targets_BT, log_z_BT)


def _backward(chunk_size, residuals, dlogps_BT):  # noqa: ANN001, ANN202
    saved, wanted = residuals
    if isinstance(dlogps_BT, SymbolicZero):
        return None, None, None
    x_BTD, head_DV, *_ = saved
    place = placement(x_BTD, head_DV)
    with_head = wanted.ndim > 0
    local = functools.partial(
        _local_backward, layout=place.layout, chunk_size=chunk_size, with_head=with_head
    )
    outputs = (_X, _HEAD) if with_head else (_X,)
    run = _on_shards(local, place, outputs, (_X, _HEAD, _TOKENS, _TOKENS, _TOKENS))
    dx_BTD, *dheads_DV = run(*saved, dlogps_BT)
    return dx_BTD, dheads_DV[0].astype(head_DV.dtype) if with_head else None, None


_token_logps.defvjp(_forward, _backward, symbolic_zeros=True)

# Kinds of array, as `_on_shards` lays them out.
_X, _HEAD, _TOKENS = "x", "head", "tokens"


def _on_shards(
    local: Callable[..., Any], place: Placement, outputs: tuple[str, ...], inputs: tuple[str, ...]
) -> Callable[..., Any]:
    if place.mesh is None:
        return local
    specs = {_X: PartitionSpec(*place.tokens, None), _HEAD: place.head, _TOKENS: place.tokens}
    return jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=tuple(specs[kind] for kind in inputs),
        out_specs=tuple(specs[kind] for kind in outputs),
    )


def _local_forward(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, layout: Layout, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities, and the logs of the denominators, of one device's tokens."""

    def chunk(x_CD: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = targets_C.shape[0]
        logits_CV = _logits(gather(x_CD, layout), head_DV)
        log_z_C = log_z(logits_CV, layout)
        hit_CV = one_hot(gather(targets_C, layout), logits_CV.shape[1], layout)
        target_C = psum(jnp.where(hit_CV, logits_CV, 0.0).sum(axis=1), layout.vocab_axes)
        log_z_C, target_C = (own(y, count, layout) for y in (log_z_C, target_C))
        return target_C - log_z_C, log_z_C

    chunks = tuple(into_chunks(array, chunk_size) for array in (x_BTD, targets_BT))
    results = jax.lax.map(lambda inputs: chunk(*inputs), chunks)
    logps_BT, log_z_BT = (out_of_chunks(result, targets_BT.shape) for result in results)
    return logps_BT, log_z_BT


def _local_backward(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    log_z_BT: jax.Array,
    dlogps_BT: jax.Array,
    *,
    layout: Layout,
    chunk_size: int,
    with_head: bool,
) -> tuple[jax.Array, ...]:
    """Gradients of x, of one device's tokens, and where asked for of its columns of the head."""

    def chunk(dhead_VD: Any, inputs: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        x_CD, targets_C, log_z_C, dlogps_C = (gather(y, layout) for y in inputs)
        logits_CV = _logits(x_CD, head_DV)
        hit_CV = one_hot(targets_C, logits_CV.shape[1], layout)
        dlogits_CV = hit_CV.astype(jnp.float32) - jnp.exp(logits_CV - log_z_C[:, None])
        # A select where the cotangent is 0, for there the logits may be inf or NaN; and so may x.
        used_C1 = (dlogps_C != 0)[:, None]
        dlogits_CV = jnp.where(used_C1, dlogits_CV * dlogps_C[:, None], 0.0).astype(x_CD.dtype)
        x_CD = jnp.where(used_C1, x_CD, 0)
        dx_CD = jnp.einsum("CV,DV->CD", dlogits_CV, head_DV, preferred_element_type=jnp.float32)
        # Made as [V, D] for the reasons given in `cross_entropy`.
        if with_head:
            dhead_VD += jnp.einsum(
                "CD,CV->VD", x_CD, dlogits_CV, preferred_element_type=jnp.float32
            )
        return dhead_VD, scatter(dx_CD.astype(x_CD.dtype), layout)

    chunks = tuple(
        into_chunks(array, chunk_size) for array in (x_BTD, targets_BT, log_z_BT, dlogps_BT)
    )
    dhead_VD = None
    if with_head:
        dhead_VD = jnp.zeros(head_DV.shape[::-1], jnp.float32)
        dhead_VD = varying(dhead_VD, layout.token_axes + layout.other_vocab_axes)
    dhead_VD, dx = jax.lax.scan(chunk, dhead_VD, chunks)
    dx_BTD = out_of_chunks(dx, x_BTD.shape)
    return (dx_BTD, psum(dhead_VD, layout.other_token_axes).T) if with_head else (dx_BTD,)


def _logits(x_CD: jax.Array, head_DV: jax.Array) -> jax.Array:
    # Asking the matmul for float32 keeps the sum over D, and so the result, out of bfloat16.
    return jnp.einsum("CD,DV->CV", x_CD, head_DV, preferred_element_type=jnp.float32)
