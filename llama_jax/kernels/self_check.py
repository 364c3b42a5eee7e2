"""The start-up check: the chosen backend against `reference` on one packed batch, before a run.

A kernel that is wrong on one chip, compiler version or shape trains on, only worse; this refuses.
B rows, T tokens, N query heads, K key-value heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.config.loading import ConfigError
from llama_jax.kernels.attention import attention, local_shape
from llama_jax.kernels.choice import choose_backend, current_device, describe_choice
from llama_jax.sharding.rules import axis_size, lay_out
from llama_jax.sharding.zigzag import to_zigzag

# Tokens of a checked row: two blocks of each kernel's. On a CPU blocks are smaller, and time dear.
CHECKED_TOKENS = {"cpu": 512}
CHECKED_TOKENS_OTHERWISE = 2048
# Largest difference, as a share of the largest value. Rounding of the weights to bfloat16 gives up
# to about 0.01. A TPU multiplies float32 in bfloat16 by default, so that it gets no closer there.
TOLERANCE = {"float32": 1e-4}
TOLERANCE_OTHERWISE = 0.03
NAMES = ("the output", "the gradient of q", "the gradient of k", "the gradient of v")


def choose_and_check(
    *,
    backend: str,
    context: str,
    dtype: str,
    rows: int,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    check: bool,
) -> str:
    """The backend that a run's attention gets on the current mesh, in a line to print; checked.

    Args:
      backend: "auto" or a name, as `context` and `check` from the run's execution table.
      rows: of a microbatch, over all devices; `length` tokens each.
      num_heads: of the model, as `num_kv_heads` and `head_dim`.

    Raises:
      ConfigError: the backend can't run here, or its values or gradients differ from those of
        `reference`.
    """
    device = current_device()
    shape = local_shape((rows, length, num_heads, head_dim), length, jnp.dtype(dtype))
    ring = context == "ring" and axis_size("length") > 1
    name = choose_backend(backend, shape, device, ring=ring)
    line = describe_choice(name, backend, shape, device)
    if name == "reference" or not check:
        return line if name == "reference" else f"{line}; not checked"
    # Two query heads at most a key-value head, one of these a device: as many show as much.
    ways = axis_size("kv_heads")
    group = min(2, num_heads // num_kv_heads)
    run = functools.partial(
        _differences,
        name,
        context,
        jnp.dtype(dtype),
        (
            axis_size("batch"),
            _checked_length(length, device.platform),
            ways * group,
            ways,
            head_dim,
        ),
    )
    differences = [float(x) for x in jax.jit(run)()]
    on_tpu = device.platform == "tpu"
    allowed = TOLERANCE_OTHERWISE if on_tpu else TOLERANCE.get(dtype, TOLERANCE_OTHERWISE)
    for what, difference in zip(NAMES, differences, strict=True):
        if not difference <= allowed:  # so that NaN is refused as well
            raise ConfigError(
                f"'{name}' computes {what} wrongly on {device.kind}: it differs from that of "
                f"'reference' by {difference:.2g} of its largest value, {allowed:.2g} is allowed; "
                "use another backend, or execution.check_attention = false to train all the same",
                key="execution.attention",
            )
    return f"{line}; equal to reference within {max(differences):.1g}"


def _checked_length(length: int, platform: str) -> int:
    most = min(length, CHECKED_TOKENS.get(platform, CHECKED_TOKENS_OTHERWISE))
    chunks = 2 * axis_size("length")  # of the zigzag order
    return max(most // chunks, 1) * chunks


def _differences(
    name: str, context: str, dtype: jnp.dtype, sizes: tuple[int, int, int, int, int]
) -> list[jax.Array]:
    """Of the output and the gradients of q, k and v: largest difference over largest value."""
    B, T, N, K, H = sizes
    keys = jax.random.split(jax.random.key(0), 4)
    queries = ("batch", "length", "q_heads", "head_dim")
    keys_dims = ("batch", "length", "kv_heads", "head_dim")
    q_BTNH, pull_BTNH = (
        lay_out(jax.random.normal(key, (B, T, N, H), jnp.float32).astype(dtype), queries)
        for key in keys[:2]
    )
    k_BTKH, v_BTKH = (
        lay_out(jax.random.normal(key, (B, T, K, H), jnp.float32).astype(dtype), keys_dims)
        for key in keys[2:]
    )
    ids_BT = to_zigzag(lay_out(_packed(B, T), ("batch", "length")))

    def values(backend: str) -> tuple[jax.Array, ...]:
        def out_of(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(
                q,
                k,
                v,
                q_segment_ids_BT=ids_BT,
                kv_segment_ids_BS=ids_BT,
                backend=backend,
                context=context if backend == name else "gather",  # type: ignore[arg-type]
            )

        out_BTNH, pull = jax.vjp(out_of, q_BTNH, k_BTKH, v_BTKH)
        return out_BTNH, *pull(pull_BTNH)

    pairs = zip(values(name), values("reference"), strict=True)
    return [_difference(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]


def _difference(got: jax.Array, wanted: jax.Array) -> jax.Array:
    difference = jnp.abs(got - wanted).max() / jnp.abs(wanted).max()
    # Said apart: compilers may take a maximum in ways that lose NaN.
    return jnp.where(jnp.isfinite(got).all(), difference, jnp.nan)


def _packed(B: int, T: int) -> jax.Array:
    """int32 [B, T]: three segments a row, cut elsewhere in each, and an eighth of padding."""
    places_T = jnp.arange(T, dtype=jnp.int32)
    shift_B1 = (jnp.arange(B, dtype=jnp.int32) % 7)[:, None]
    first, second = T // 5 + shift_B1, T // 2 + 3 + shift_B1
    ids_BT = 1 + (places_T >= first).astype(jnp.int32) + (places_T >= second)
    return jnp.where(places_T >= T - T // 8, 0, ids_BT)
