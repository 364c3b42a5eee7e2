"""Tokens before a large head, a chunk at a time, on the shards of a mesh that split both.

What the losses over a vocabulary share: who holds which tokens and columns, taken from the arrays'
own layouts, and what moves between those devices. Axes that split tokens and vocabulary alike are
passed twice a chunk: its tokens are gathered over them, and gradients of x are scattered back.

Letters: B batch, T length, D model width, V vocabulary; C tokens of a chunk, M chunks.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

# Which gradients are made: of the tokens' arrays, or of the head too.
Wanted = Literal["none", "tokens", "all"]


class Layout(NamedTuple):
    """Mesh axes that split the tokens and the vocabulary of the arrays at hand."""

    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()

    @property
    def shared_axes(self) -> tuple[str, ...]:
        """Those that split both: each device there has other tokens and other columns."""
        return tuple(axis for axis in self.vocab_axes if axis in self.token_axes)

    @property
    def other_token_axes(self) -> tuple[str, ...]:
        """Those that split the tokens alone."""
        return tuple(axis for axis in self.token_axes if axis not in self.vocab_axes)

    @property
    def other_vocab_axes(self) -> tuple[str, ...]:
        """Those that split the vocabulary alone."""
        return tuple(axis for axis in self.vocab_axes if axis not in self.token_axes)


class Placement(NamedTuple):
    """The specs of arrays as `lay_out` leaves them; `mesh` is None where nothing is split."""

    mesh: AbstractMesh | None
    tokens: PartitionSpec
    head: PartitionSpec

    @property
    def layout(self) -> Layout:
        """The same as mesh axes."""
        return Layout(_axes(*self.tokens), _axes(self.head[1]))


def placement(x_BTD: jax.Array, head_DV: jax.Array) -> Placement:
    """How tokens and vocabulary are split: the tokens as x has them, D whole on every device."""
    mesh = jax.typeof(x_BTD).sharding.mesh
    if mesh.size <= 1:  # includes the empty mesh: no device to talk to
        return Placement(None, PartitionSpec(None, None), PartitionSpec(None, None))
    batch, length, *_ = (*jax.typeof(x_BTD).sharding.spec, None, None)
    vocab = (*jax.typeof(head_DV).sharding.spec, None, None)[1]
    return Placement(mesh, PartitionSpec(batch, length), PartitionSpec(None, vocab))


def lay_out_tokens(array: jax.Array, place: Placement) -> jax.Array:
    """A [B, T, ...] array where the loss needs it."""
    return _reshard(array, PartitionSpec(*place.tokens, *[None] * (array.ndim - 2)))


def lay_out_head(head_DV: jax.Array, place: Placement) -> jax.Array:
    """A [D, V] array where the loss needs it."""
    return _reshard(head_DV, place.head)


def into_chunks(array: jax.Array, chunk_size: int) -> jax.Array:
    """[B, T, ...] to [M, C, ...], the chunks as even as they can be; padded with zeros."""
    tokens = array.shape[0] * array.shape[1]
    chunks = -(-tokens // chunk_size)
    size = -(-tokens // chunks)
    padding = chunks * size - tokens
    flat = array.reshape(tokens, *array.shape[2:])
    flat = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)) if padding else flat
    return flat.reshape(chunks, size, *flat.shape[1:])


def out_of_chunks(chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `into_chunks`; from one chunk alone, [C, ...], too."""
    tokens = shape[0] * shape[1]
    return chunks.reshape(-1, *shape[2:])[:tokens].reshape(shape)


def gather(array_C: jax.Array, layout: Layout) -> jax.Array:
    """The chunk's rows of all devices that have other columns of the vocabulary."""
    axes = layout.shared_axes
    return jax.lax.all_gather(array_C, axes, axis=0, tiled=True) if axes else array_C


def scatter(array_CD: jax.Array, layout: Layout) -> jax.Array:
    """Sums over the vocabulary's shards, of each device's own rows."""
    axes = layout.shared_axes
    if axes:
        array_CD = jax.lax.psum_scatter(array_CD, axes, scatter_dimension=0, tiled=True)
    return psum(array_CD, layout.other_vocab_axes)


def own(array_C: jax.Array, count: int, layout: Layout) -> jax.Array:
    """This device's rows of gathered ones."""
    if not layout.shared_axes:
        return array_C
    start = jax.lax.axis_index(layout.shared_axes) * count
    return jax.lax.dynamic_slice_in_dim(array_C, start, count)


def first_column(vocab_size: int, layout: Layout) -> jax.Array | int:
    """The id of this device's first of `vocab_size` columns."""
    return jax.lax.axis_index(layout.vocab_axes) * vocab_size if layout.vocab_axes else 0


def one_hot(targets_C: jax.Array, vocab_size: int, layout: Layout) -> jax.Array:
    """Whether each column is the token's target, as booleans that fuse into their use."""
    ids_V = jnp.arange(vocab_size, dtype=targets_C.dtype)
    if layout.vocab_axes:
        ids_V += jax.lax.axis_index(layout.vocab_axes).astype(ids_V.dtype) * vocab_size
    return targets_C[:, None] == ids_V[None, :]


def log_z(logits_CV: jax.Array, layout: Layout) -> jax.Array:
    """float32 [C]: the log of the softmax's denominator over all columns."""
    max_C = pmax(logits_CV.max(axis=1), layout.vocab_axes)
    sum_C = psum(jnp.exp(logits_CV - max_C[:, None]).sum(axis=1), layout.vocab_axes)
    return max_C + jnp.log(sum_C)


def weighted(weights_C: jax.Array, values_C: jax.Array) -> jax.Array:
    """The sum of weights times values, of those whose weight isn't 0."""
    # Not a plain product: a padded token's value may be inf or NaN, and 0 * inf is NaN.
    return jnp.where(weights_C != 0, weights_C * values_C, 0.0).sum()


def psum(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`jax.lax.psum`; the identity over no axes."""
    return jax.lax.psum(value, axes) if axes else value


def pmax(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`jax.lax.pmax`; the identity over no axes."""
    return jax.lax.pmax(value, axes) if axes else value


def varying(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Typed as differing over the axes, as a loop's carry must be from its start."""
    return jax.lax.pcast(value, axes, to="varying") if axes else value


def _reshard(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    mesh = jax.typeof(array).sharding.mesh
    if mesh.empty:
        return array
    # On a mesh of one nothing is split, and axis names in the types would only forbid reshapes.
    return jax.sharding.reshard(array, spec)


def _axes(*entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in entries of a PartitionSpec."""
    axes: tuple[str, ...] = ()
    for entry in entries:
        axes += (entry,) if isinstance(entry, str) else tuple(entry or ())
    return axes
