"""Distillation: a student's distribution of every token drawn to a teacher's, in chunks.

As `cross_entropy`, with the gradient made in the forward pass: the float32 logits of all tokens,
the student's or the teacher's, never exist together. The teacher is there as what its head reads,
or as its most likely tokens stored with what is left over lumped into one outcome.

Letters: B batch, T length, D student's width, E teacher's width, V vocabulary, K stored tokens;
C tokens of a chunk, M chunks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from llama_jax.losses.chunks import (
    Layout,
    Placement,
    Wanted,
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
    weighted,
)
from llama_jax.losses.matching import Matching, full_match, stored_match


class LiveTeacher(NamedTuple):
    """The teacher's [B, T, E] and its head [E, V], for all of its logits."""

    x: jax.Array
    head: jax.Array


class StoredTeacher(NamedTuple):
    """Its K most likely tokens: distinct ids, and log-probabilities at temperature 1, [B, T, K].

    The probability that is missing to 1 is that of all other tokens together. The divergence is of
    these K + 1 outcomes, which is at most the full one; a temperature is applied to the outcomes.
    With all V tokens stored both are those of the full logits.
    """

    ids: jax.Array
    logps: jax.Array


class _Totals(NamedTuple):
    """Sums over tokens, float32 scalars."""

    loss: jax.Array
    cross_entropy: jax.Array
    tokens: jax.Array


class _Tokens(NamedTuple):
    """What is known of each token: [B, T], and of the teacher [B, T, _]."""

    targets: jax.Array
    weights: jax.Array
    teacher: tuple[jax.Array, ...]  # x, or ids and log-probabilities


def distillation_loss(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    teacher: LiveTeacher | StoredTeacher,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    matching: Matching,
    chunk_size: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over tokens of `weight * temperature^2 * divergence(teacher, student)`.

    Args:
      x_BTD: what the student's head is applied to; see `cross_entropy` on dtypes and layouts.
      head_DV: the student's head.
      teacher: carries no gradient.
      targets_BT: ids in [0, V), for the cross entropy among the sums alone.
      weights_BT: float32; a token of weight 0 adds nothing, whatever its logits. No gradient.
      chunk_size: tokens a chunk, on each device.

    Returns:
      The float32 sum, differentiable in x and head, and sums without gradient: `cross_entropy` (of
      the student and the targets, at temperature 1) and `tokens` (the weights).

    Raises:
      ValueError: the teacher's vocabulary, or what is stored of it, doesn't fit the student's.
    """
    _check_vocabularies(head_DV.shape[1], teacher)
    place = placement(x_BTD, head_DV)
    live = isinstance(teacher, LiveTeacher)
    known = (teacher.x,) if live else tuple(teacher)
    tokens = _Tokens(targets_BT, weights_BT, known)
    tokens = jax.tree.map(lambda array: lay_out_tokens(array, place), tokens)
    teacher_head = lay_out_head(teacher.head, place) if live else None
    result: Any = _distill(
        lay_out_tokens(x_BTD, place),
        lay_out_head(head_DV, place),
        jax.lax.stop_gradient(tokens),
        jax.lax.stop_gradient(teacher_head),
        matching,
        chunk_size,
    )
    loss, totals = result
    del totals["loss"]
    return loss, jax.lax.stop_gradient(totals)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _distill(x_BTD, head_DV, tokens, teacher_head, matching, chunk_size):  # noqa: ANN001, ANN202
    run = functools.partial(_on_shards, matching=matching, chunk_size=chunk_size)
    totals, _ = run(x_BTD, head_DV, tokens, teacher_head, wanted="none")
    return totals.loss, totals._asdict()


def _forward(x, head, tokens, teacher_head, matching, chunk_size):  # noqa: ANN001, ANN202
    run = functools.partial(_on_shards, matching=matching, chunk_size=chunk_size)
    # A frozen head's gradient isn't made.
    wanted = "all" if head.perturbed else "tokens"
    arrays = jax.tree.map(lambda array: array.value, (x, head, tokens, teacher_head))
    totals, gradients = run(*arrays, wanted=wanted)
    return (totals.loss, totals._asdict()), (gradients, head.value)


def _backward(matching, chunk_size, residuals, cotangents):  # noqa: ANN001, ANN202
    del matching, chunk_size
    (dx_BTD, dhead_DV), head_DV = residuals
    scale = cotangents[0]  # the totals' cotangents are zero: they carry no gradient
    if isinstance(scale, SymbolicZero):
        return None, None, None, None
    return (
        (scale * dx_BTD).astype(dx_BTD.dtype),
        (scale * dhead_DV).astype(head_DV.dtype) if dhead_DV.ndim else None,
        None,
        None,
    )


_distill.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_shards(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    tokens: _Tokens,
    teacher_head: jax.Array | None,
    *,
    matching: Matching,
    chunk_size: int,
    wanted: Wanted,
) -> tuple[_Totals, Any]:
    """`_local` on each device's part of the arrays, as their own shardings split them."""
    place = placement(x_BTD, head_DV)
    local = functools.partial(
        _local,
        layout=place.layout,
        matching=matching,
        chunk_size=chunk_size,
        wanted=wanted,
    )
    arrays = (x_BTD, head_DV, tokens, teacher_head)
    if place.mesh is None:
        return local(*arrays)
    x_spec = _tokens_spec(place, x_BTD)
    token_specs = jax.tree.map(functools.partial(_tokens_spec, place), tokens)
    scalars: Any = [PartitionSpec()] * 3
    gradient_specs = (x_spec, place.head if wanted == "all" else PartitionSpec())
    return jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=(x_spec, place.head, token_specs, None if teacher_head is None else place.head),
        out_specs=(_Totals(*scalars), None if wanted == "none" else gradient_specs),
    )(*arrays)


def _local(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    tokens: _Tokens,
    teacher_head: jax.Array | None,
    *,
    layout: Layout,
    matching: Matching,
    chunk_size: int,
    wanted: Wanted,
) -> tuple[_Totals, tuple[jax.Array, jax.Array] | None]:
    """The tokens of one device in chunks; totals and gradients are summed over the mesh.

    A head whose gradient isn't wanted has a scalar.
    """

    def body(carry: Any, inputs: tuple[jax.Array, _Tokens]) -> tuple[Any, Any]:
        totals, dlogits_CV, x_CD = _chunk(*inputs, head_DV, teacher_head, layout, matching)
        sums, dhead_VD = carry
        sums = jax.tree.map(jnp.add, sums, totals)
        if wanted == "none":
            return (sums, None), None
        dx_CD = jnp.einsum("CV,DV->CD", dlogits_CV, head_DV, preferred_element_type=jnp.float32)
        # Made as [V, D] for the reasons given in `cross_entropy`.
        if wanted == "all":
            dhead_VD += jnp.einsum(
                "CD,CV->VD", x_CD, dlogits_CV, preferred_element_type=jnp.float32
            )
        return (sums, dhead_VD), scatter(dx_CD.astype(x_CD.dtype), layout)

    zero = varying(jnp.zeros((), jnp.float32), layout.token_axes)
    dhead_VD = None
    if wanted == "all":
        dhead_VD = jnp.zeros(head_DV.shape[::-1], jnp.float32)
        dhead_VD = varying(dhead_VD, layout.token_axes + layout.other_vocab_axes)
    chunks = jax.tree.map(lambda array: into_chunks(array, chunk_size), (x_BTD, tokens))
    (totals, dhead_VD), dx = jax.lax.scan(body, (_Totals(*[zero] * 3), dhead_VD), chunks)
    totals = jax.tree.map(lambda total: psum(total, layout.token_axes), totals)
    if wanted == "none":
        return totals, None
    dx_BTD = out_of_chunks(dx, x_BTD.shape)
    dhead_DV = jnp.zeros(()) if dhead_VD is None else psum(dhead_VD, layout.other_token_axes).T
    return totals, (dx_BTD, dhead_DV)


def _chunk(
    x_CD: jax.Array,
    tokens: _Tokens,
    head_DV: jax.Array,
    teacher_head: jax.Array | None,
    layout: Layout,
    matching: Matching,
) -> tuple[_Totals, jax.Array, jax.Array]:
    """One chunk's totals, the derivative by its logits, and its x, both of the gathered tokens."""
    own_weights_C, count = tokens.weights, x_CD.shape[0]
    x_CD, tokens = jax.tree.map(lambda array: gather(array, layout), (x_CD, tokens))
    logits_CV = _logits(x_CD, head_DV)
    if teacher_head is None:
        ids_CK, logps_CK = tokens.teacher
        loss_C, slope_CV = stored_match(logits_CV, ids_CK, logps_CK, layout, matching)
    else:
        teacher_CV = _logits(tokens.teacher[0], teacher_head)
        loss_C, slope_CV = full_match(logits_CV, teacher_CV, layout, matching)
    hit_CV = one_hot(tokens.targets, logits_CV.shape[1], layout)
    target_C = psum(jnp.where(hit_CV, logits_CV, 0.0).sum(axis=1), layout.vocab_axes)
    cross_entropy_C = log_z(logits_CV, layout) - target_C
    totals = _Totals(
        loss=weighted(own_weights_C, own(loss_C, count, layout)) * matching.temperature**2,
        cross_entropy=weighted(own_weights_C, own(cross_entropy_C, count, layout)),
        tokens=own_weights_C.sum(),
    )
    # The slope is by logits / temperature. A select where nothing counts: there all may be NaN.
    used_C1 = (tokens.weights != 0)[:, None]
    scale_C1 = tokens.weights[:, None] * matching.temperature
    dlogits_CV = jnp.where(used_C1, slope_CV * scale_C1, 0.0).astype(x_CD.dtype)
    return totals, dlogits_CV, jnp.where(used_C1, x_CD, 0)


def _logits(x_CD: jax.Array, head_DV: jax.Array) -> jax.Array:
    return jnp.einsum("CD,DV->CV", x_CD, head_DV, preferred_element_type=jnp.float32)


def _tokens_spec(place: Placement, array: jax.Array) -> PartitionSpec:
    return PartitionSpec(*place.tokens, *[None] * (array.ndim - 2))


def _check_vocabularies(size: int, teacher: LiveTeacher | StoredTeacher) -> None:
    if isinstance(teacher, LiveTeacher) and teacher.head.shape[1] != size:
        raise ValueError(
            f"the teacher has {teacher.head.shape[1]} tokens in its vocabulary, the student "
            f"{size}; distillation needs the same"
        )
    if isinstance(teacher, StoredTeacher) and teacher.ids.shape[2] > size:
        raise ValueError(
            f"{teacher.ids.shape[2]} tokens of the teacher's are stored, the student has {size}"
        )
