"""Next-token cross entropy over a large vocabulary, a chunk of tokens at a time.

The float32 logits of all tokens never exist together: each chunk's are made, reduced to a loss and
(when differentiated) to gradients, and dropped. The gradient is computed in the forward pass,
while the chunk's logits are there, so the largest matmul of a small model is never done twice.
Owns the loss, its z term and its gradient; what is a target is the data's business, and dividing
by the number of targets is the step's.

On a mesh the arrays' own layouts say who does what. Axes that split tokens and vocabulary alike are
passed twice a chunk: its tokens are gathered over them, and the gradient of x is scattered back.
The head's gradient is then complete where its columns are, and never whole on any device.

Letters: B batch, T length, D model width, V vocabulary; C tokens of a chunk, M chunks, n tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Metrics = dict[str, jax.Array]


class _Layout(NamedTuple):
    """Mesh axes that split the tokens and the vocabulary of the arrays at hand."""

    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()

    @property
    def shared_axes(self) -> tuple[str, ...]:
        """Those that split both: each device there has other tokens and other columns."""
        return tuple(axis for axis in self.vocab_axes if axis in self.token_axes)

    @property
    def other_token_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.token_axes if axis not in self.vocab_axes)

    @property
    def other_vocab_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.vocab_axes if axis not in self.token_axes)


class _Totals(NamedTuple):
    """Sums over tokens, float32 scalars."""

    cross_entropy: jax.Array
    z_loss: jax.Array
    tokens: jax.Array
    correct: jax.Array


class _Gradients(NamedTuple):
    """Derivatives of the summed loss; float32 for the head, which sums over every token."""

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
    arrays = _lay_out(x_BTD, head_DV, targets_BT, weights_BT)
    result: Any = _cross_entropy(*arrays, z_loss, chunk_size)
    loss, totals = result
    return loss, jax.lax.stop_gradient(totals._asdict())


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(x_BTD, head_DV, targets_BT, weights_BT, z_loss, chunk_size):  # noqa: ANN001, ANN202
    totals, _ = _on_shards(
        x_BTD, head_DV, targets_BT, weights_BT, z_loss, chunk_size, with_gradients=False
    )
    return totals.cross_entropy + totals.z_loss, totals


def _forward(x_BTD, head_DV, targets_BT, weights_BT, z_loss, chunk_size):  # noqa: ANN001, ANN202
    totals, gradients = _on_shards(
        x_BTD, head_DV, targets_BT, weights_BT, z_loss, chunk_size, with_gradients=True
    )
    return (totals.cross_entropy + totals.z_loss, totals), (gradients, head_DV)


def _backward(z_loss, chunk_size, residuals, cotangents):  # noqa: ANN001, ANN202
    del z_loss, chunk_size
    gradients, head_DV = residuals
    scale = cotangents[0]  # the totals' cotangents are zero: they carry no gradient
    x_BTD, weights_BT = gradients.x, gradients.weights
    return (
        (scale * x_BTD).astype(x_BTD.dtype),
        (scale * gradients.head).astype(head_DV.dtype),
        None,
        scale * weights_BT,
    )


_cross_entropy.defvjp(_forward, _backward)


def _on_shards(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    chunk_size: int,
    *,
    with_gradients: bool,
) -> tuple[_Totals, _Gradients | None]:
    """`_local` on each device's part of the arrays, as their own shardings split them."""
    arrays = (x_BTD, head_DV, targets_BT, weights_BT)
    options = {"z_loss": z_loss, "chunk_size": chunk_size, "with_gradients": with_gradients}
    sharding = jax.typeof(x_BTD).sharding
    if sharding.mesh.size <= 1:  # includes the empty mesh: no device to talk to
        return _local(*arrays, layout=_Layout(), **options)
    x_spec, head_spec, tokens_spec, _ = (jax.typeof(array).sharding.spec for array in arrays)
    layout = _Layout(_axes(*tokens_spec), _axes(head_spec[1]))
    gradients = _Gradients(x_spec, head_spec, tokens_spec) if with_gradients else None
    scalars: Any = [PartitionSpec()] * 4
    return jax.shard_map(
        functools.partial(_local, layout=layout, **options),
        mesh=sharding.mesh,
        in_specs=(x_spec, head_spec, tokens_spec, tokens_spec),
        out_specs=(_Totals(*scalars), gradients),
    )(*arrays)


def _local(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    layout: _Layout,
    z_loss: float,
    chunk_size: int,
    with_gradients: bool,
) -> tuple[_Totals, _Gradients | None]:
    """The tokens of one device in chunks; totals and gradients are summed over the mesh."""
    chunks = _into_chunks((x_BTD, targets_BT, weights_BT), chunk_size)
    chunk = functools.partial(
        _chunk, head_DV=head_DV, layout=layout, z_loss=z_loss, with_gradients=with_gradients
    )
    totals, dhead_VD, per_token = _accumulate(chunk, chunks, head_DV, layout, with_gradients)
    totals = jax.tree.map(lambda total: _psum(total, layout.token_axes), totals)
    if not with_gradients:
        return totals, None
    dx_BTD, dweights_BT = (
        array.reshape(-1, *like.shape[2:])[: weights_BT.size].reshape(like.shape)
        for array, like in zip(per_token, (x_BTD, weights_BT), strict=True)
    )
    # A replicated head's gradient is the sum over the devices that hold other tokens; a head
    # gathered for use is scattered again by the transpose of that gather.
    return totals, _Gradients(dx_BTD, _psum(dhead_VD, layout.other_token_axes).T, dweights_BT)


def _accumulate(
    chunk: Callable[..., Any],
    chunks: tuple[jax.Array, ...],
    head_DV: jax.Array,
    layout: _Layout,
    with_gradients: bool,
) -> tuple[_Totals, Any, Any]:
    """Runs `chunk` over the chunks: totals and head gradient summed, token gradients stacked."""

    def body(carry, inputs):  # noqa: ANN001, ANN202
        totals, dhead_VD, per_token = chunk(*inputs)
        return jax.tree.map(jnp.add, carry, (totals, dhead_VD)), per_token

    if chunks[0].shape[0] == 1:
        totals, dhead_VD, per_token = chunk(*(array[0] for array in chunks))
        return totals, dhead_VD, per_token
    zero = _varying(jnp.zeros((), jnp.float32), layout.token_axes)
    dhead_VD = None
    if with_gradients:
        dhead_VD = jnp.zeros(head_DV.shape[::-1], jnp.float32)
        dhead_VD = _varying(dhead_VD, layout.token_axes + layout.other_vocab_axes)
    (totals, dhead_VD), per_token = jax.lax.scan(body, (_Totals(*[zero] * 4), dhead_VD), chunks)
    return totals, dhead_VD, per_token


def _chunk(
    x_CD: jax.Array,
    targets_C: jax.Array,
    weights_C: jax.Array,
    *,
    head_DV: jax.Array,
    layout: _Layout,
    z_loss: float,
    with_gradients: bool,
) -> tuple[_Totals, jax.Array | None, tuple[jax.Array, jax.Array] | None]:
    """One chunk's totals, head gradient [V, D] and per-token gradients ([C, D] and [C])."""
    own_targets_C, own_weights_C = targets_C, weights_C
    x_CD, targets_C, weights_C = (_gather(y, layout) for y in (x_CD, targets_C, weights_C))
    # Asking the matmul for float32 keeps the sum over D, and so the loss, out of bfloat16.
    logits_CV = jnp.einsum("CD,DV->CV", x_CD, head_DV, preferred_element_type=jnp.float32)
    max_C = _pmax(logits_CV.max(axis=1), layout.vocab_axes)
    exp_CV = jnp.exp(logits_CV - max_C[:, None])
    sum_C = _psum(exp_CV.sum(axis=1), layout.vocab_axes)
    log_z_C = max_C + jnp.log(sum_C)
    hit_CV = _one_hot(targets_C, logits_CV.shape[1], layout)
    target_C = _psum(jnp.where(hit_CV, logits_CV, 0.0).sum(axis=1), layout.vocab_axes)

    count = own_targets_C.shape[0]
    own_log_z_C, own_target_C, own_max_C = (
        _own(y, count, layout) for y in (log_z_C, target_C, max_C)
    )
    cross_entropy_C, z_C = own_log_z_C - own_target_C, z_loss * own_log_z_C**2
    totals = _Totals(
        cross_entropy=_weighted(own_weights_C, cross_entropy_C),
        z_loss=_weighted(own_weights_C, z_C),
        tokens=own_weights_C.sum(),
        correct=_weighted(own_weights_C, (own_target_C >= own_max_C).astype(jnp.float32)),
    )
    if not with_gradients:
        return totals, None, None

    # d/dlogits of -log p is softmax - onehot; of z_loss * log_z^2, 2 * z_loss * log_z * softmax.
    softmax_scale_C = weights_C * (1.0 + 2.0 * z_loss * log_z_C) / sum_C
    dlogits_CV = exp_CV * softmax_scale_C[:, None] - jnp.where(hit_CV, weights_C[:, None], 0.0)
    dlogits_CV = dlogits_CV.astype(x_CD.dtype)
    dx_CD = jnp.einsum("CV,DV->CD", dlogits_CV, head_DV, preferred_element_type=jnp.float32)
    # Made as [V, D]: XLA's CPU backend takes 1.7 times as long for [D, V], and a tied head wants
    # its gradient so anyway.
    dhead_VD = jnp.einsum("CD,CV->VD", x_CD, dlogits_CV, preferred_element_type=jnp.float32)
    # Sent in x's dtype, which is what it ends in: half the bytes.
    dx_CD = _scatter(dx_CD.astype(x_CD.dtype), layout)
    return totals, dhead_VD, (dx_CD, cross_entropy_C + z_C)


def _gather(array_C: jax.Array, layout: _Layout) -> jax.Array:
    """The chunk's rows of all devices that have other columns of the vocabulary."""
    axes = layout.shared_axes
    return jax.lax.all_gather(array_C, axes, axis=0, tiled=True) if axes else array_C


def _scatter(array_CD: jax.Array, layout: _Layout) -> jax.Array:
    """Sums over the vocabulary's shards, of each device's own rows."""
    axes = layout.shared_axes
    if axes:
        array_CD = jax.lax.psum_scatter(array_CD, axes, scatter_dimension=0, tiled=True)
    return _psum(array_CD, layout.other_vocab_axes)


def _own(array_C: jax.Array, count: int, layout: _Layout) -> jax.Array:
    """This device's rows of gathered ones."""
    if not layout.shared_axes:
        return array_C
    start = jax.lax.axis_index(layout.shared_axes) * count
    return jax.lax.dynamic_slice_in_dim(array_C, start, count)


def _weighted(weights_C: jax.Array, values_C: jax.Array) -> jax.Array:
    # Not a plain product: a padded token's value may be inf or NaN, and 0 * inf is NaN.
    return jnp.where(weights_C != 0, weights_C * values_C, 0.0).sum()


def _one_hot(targets_C: jax.Array, vocab_size: int, layout: _Layout) -> jax.Array:
    """Whether each column is the token's target, as booleans that fuse into their use."""
    ids_V = jnp.arange(vocab_size, dtype=targets_C.dtype)
    if layout.vocab_axes:
        ids_V += jax.lax.axis_index(layout.vocab_axes).astype(ids_V.dtype) * vocab_size
    return targets_C[:, None] == ids_V[None, :]


def _into_chunks(arrays: tuple[jax.Array, ...], chunk_size: int) -> tuple[jax.Array, ...]:
    """[B, T, ...] to [M, C, ...], the chunks as even as they can be; padding has weight 0."""
    tokens = arrays[0].shape[0] * arrays[0].shape[1]
    chunks = -(-tokens // chunk_size)
    size = -(-tokens // chunks)
    padding = chunks * size - tokens

    def split(array: jax.Array) -> jax.Array:
        flat = array.reshape(tokens, *array.shape[2:])
        flat = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)) if padding else flat
        return flat.reshape(chunks, size, *flat.shape[1:])

    return tuple(split(array) for array in arrays)


def _axes(*entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in entries of a PartitionSpec."""
    axes: tuple[str, ...] = ()
    for entry in entries:
        axes += (entry,) if isinstance(entry, str) else tuple(entry or ())
    return axes


def _lay_out(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, ...]:
    """The arrays where the loss needs them: tokens as x has them, D whole on every device."""
    mesh = jax.typeof(x_BTD).sharding.mesh
    if mesh.empty:
        return x_BTD, head_DV, targets_BT, weights_BT
    if mesh.size == 1:  # nothing is split, and axis names in the types would only forbid reshapes
        specs = (PartitionSpec(),) * 4
    else:
        batch, length, *_ = (*jax.typeof(x_BTD).sharding.spec, None, None)
        vocab = (*jax.typeof(head_DV).sharding.spec, None, None)[1]
        tokens = PartitionSpec(batch, length)
        specs = (PartitionSpec(batch, length, None), PartitionSpec(None, vocab), tokens, tokens)
    arrays = (x_BTD, head_DV, targets_BT, weights_BT)
    return tuple(
        jax.sharding.reshard(array, spec) for array, spec in zip(arrays, specs, strict=True)
    )


def _psum(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(value, axes) if axes else value


def _pmax(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.pmax(value, axes) if axes else value


def _varying(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.pcast(value, axes, to="varying") if axes else value
