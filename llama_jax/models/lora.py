"""Low-rank adapters beside frozen projections: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353).

A projection `q_proj` that is adapted has `q_proj_lora_a` [in..., U] and `q_proj_lora_b`
[U, out...], for DoRA also `q_proj_dora_scale` [out...], beside it; all float32 whatever the
weights' dtype. B starts at 0, so that a fresh adapter changes nothing. U rank.
"""

import math
import string
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import MatmulPrecision
from llama_jax.models.matmul import GATHERED, project
from llama_jax.models.params import filled, weight
from llama_jax.sharding.rules import Dims, at_use

LORA_A, LORA_B, DORA_SCALE = "_lora_a", "_lora_b", "_dora_scale"
ADAPTER_ENDINGS = (LORA_A, LORA_B, DORA_SCALE)
REWARD_HEAD = ("reward_head",)
Path = tuple[str, ...]


class Adapter(nnx.Param):
    """A parameter of an adapter: where a model has some, they are what a step changes."""


def trainable_paths(paths: Iterable[Path]) -> list[Path]:
    """Those that a step changes: all, or where there are adapters they and a reward head."""
    paths = list(paths)
    chosen = [path for path in paths if path[-1].endswith(ADAPTER_ENDINGS)]
    return [*chosen, *(path for path in paths if path == REWARD_HEAD)] if chosen else paths


def split_params(state: nnx.State) -> tuple[nnx.State, nnx.State]:
    """A model's parameters, abstract or not, as what a step changes and what it only reads.

    `nnx.merge(graphdef, trainable, frozen)` is the model again.
    """
    named = {tuple(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    chosen = set(trainable_paths(named))
    trainable = [pair for path, pair in named.items() if path in chosen]
    frozen = [pair for path, pair in named.items() if path not in chosen]
    return nnx.from_flat_state(trainable), nnx.from_flat_state(frozen)


def add_adapters(
    module: nnx.Module, dims: Mapping[str, Dims], adapter: AdapterConfig, *, rngs: nnx.Rngs
) -> None:
    """Give a module's projections adapters, those that `adapter.targets` names.

    Called after all of a layer's weights are made: what is drawn here changes none of them.

    Args:
      dims: of the module's projections by name.
    """
    setattr(module, "adapter", adapter)  # noqa: B010
    for name in filter(adapter.targets.__contains__, dims):
        w, w_dims, inputs = getattr(module, name), dims[name], num_inputs(name)
        ins, outs = w.shape[:inputs], w.shape[inputs:]
        # The spread that PEFT draws A with, so that learning rates carry over.
        std = 1 / math.sqrt(3 * math.prod(ins))
        a_dims, b_dims = (*w_dims[:inputs], None), (None, *w_dims[inputs:])
        make_a = weight(
            rngs, name + LORA_A, a_dims, (*ins, adapter.rank), std, "float32", kind=Adapter
        )
        setattr(module, name + LORA_A, make_a)
        b = filled(0.0, name + LORA_B, b_dims, (adapter.rank, *outs), "float32", kind=Adapter)
        setattr(module, name + LORA_B, b)
        if adapter.dora:
            scale = filled(1.0, name + DORA_SCALE, w_dims[inputs:], outs, "float32", kind=Adapter)
            scale.set_value(output_norms(w[...], inputs))
            setattr(module, name + DORA_SCALE, scale)


def num_inputs(name: str) -> int:
    """How many leading dims of a projection's weight are inputs: two of o_proj, one of others."""
    return 2 if name == "o_proj" else 1


def adapted(
    module: nnx.Module,
    proj: str,
    spec: str,
    x: jax.Array,
    w_dims: Dims,
    out_dims: Dims,
    precision: MatmulPrecision,
    name: str | None = None,
) -> jax.Array:
    """`project` of a module's projection `proj`, with its adapter where it has one.

    The adapter's own products are made in x's dtype whatever the precision: they are few.
    """
    w = getattr(module, proj)[...]
    lora_a = getattr(module, proj + LORA_A, None)
    if lora_a is None:
        return project(spec, x, w, w_dims, out_dims, precision, name)
    a, b = lora_a[...], getattr(module, proj + LORA_B)[...]
    y = project(spec, x, w, w_dims, out_dims, precision)
    adapter: AdapterConfig = getattr(module, "adapter")  # noqa: B009
    y += adapter.scale * _low_rank(spec, x, a, b, w_dims, out_dims)
    if adapter.dora:
        scale = getattr(module, proj + DORA_SCALE)[...]
        # The norm counts as a constant in the gradient (the paper's section 4.3).
        w, a_, b_ = jax.lax.stop_gradient((w, a, b))
        ratio = scale / output_norms(w, num_inputs(proj), a_, b_, adapter.scale)
        y *= at_use(ratio.astype(y.dtype), w_dims[num_inputs(proj) :])
    return checkpoint_name(y, name) if name else y


def output_norms(
    w: jax.Array,
    inputs: int,
    a: jax.Array | None = None,
    b: jax.Array | None = None,
    scale: float = 0.0,
) -> jax.Array:
    """float32 [out...], the length of each output's weights in `w + scale a b`, laid out as w's.

    By its square, |w|^2 + 2 scale (w a) b + scale^2 b (a a) b, so that no array of w's size is
    made.
    """
    ins, outs = _letters(w.ndim, inputs)
    spec = _spec(w)
    axes = tuple(range(inputs))
    square = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=axes)
    if a is not None and b is not None:
        out_spec = None if spec is None else PartitionSpec(*spec[inputs:], None)
        wa = _product(f"{ins}{outs},{ins}U->{outs}U", w.astype(jnp.float32), a, out_spec)
        aa = _product(f"{ins}U,{ins}V->UV", a, a, None if spec is None else PartitionSpec())
        last = jnp.moveaxis(b, 0, -1)
        square += scale * jnp.sum((2 * wa + scale * jnp.matmul(last, aa)) * last, axis=-1)
    return jnp.sqrt(square)


def merged_weight(
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    dora_scale: jax.Array | None,
    inputs: int,
    scale: float,
) -> jax.Array:
    """The one weight that computes what `w` with its adapter does, in float32, laid out as `w`."""
    ins, outs = _letters(w.ndim, inputs)
    wide = w.astype(jnp.float32)
    wide += scale * _product(f"{ins}U,U{outs}->{ins}{outs}", a, b, _spec(w))
    if dora_scale is None:
        return wide
    return wide * (dora_scale / output_norms(wide, inputs))


def _low_rank(
    spec: str, x: jax.Array, a: jax.Array, b: jax.Array, w_dims: Dims, out_dims: Dims
) -> jax.Array:
    """(x a) b."""
    operands, out = spec.split("->")
    x_letters, w_letters = operands.split(",")
    inputs = len(set(x_letters) & set(w_letters))
    ins, outs = w_letters[:inputs], w_letters[inputs:]
    rows = out.removesuffix(outs)
    low_dims = (*(GATHERED.get(dim, dim) for dim in out_dims[: len(rows)]), None)
    a_spec, b_spec = f"{x_letters},{ins}U->{rows}U", f"{rows}U,U{outs}->{out}"
    low = project(a_spec, x, a, (*w_dims[:inputs], None), low_dims, "default")
    return project(b_spec, low, b, (None, *w_dims[inputs:]), out_dims, "default")


def _product(spec: str, x: jax.Array, y: jax.Array, layout: PartitionSpec | None) -> jax.Array:
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(spec, x, y, precision=highest, out_sharding=layout)


def _letters(count: int, inputs: int) -> tuple[str, str]:
    letters = string.ascii_lowercase[:count]
    return letters[:inputs], letters[inputs:]


def _spec(array: jax.Array) -> PartitionSpec | None:
    """How an array lies; None where no mesh is set."""
    sharding = jax.typeof(array).sharding
    return None if sharding.mesh.empty else sharding.spec
