"""Every matrix product of the network: weights cast and gathered at use, sums in float32."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llama_jax.sharding.rules import Dims, at_use, out_spec


def project(
    spec: str, x: jax.Array, w: jax.Array, w_dims: Dims, out_dims: Dims, name: str
) -> jax.Array:
    """`einsum(spec, x, w)` in x's dtype, laid out by `out_dims`.

    The weight is cast before it is gathered over fsdp, so that the gather moves compute-dtype
    bytes.
    """
    gathered = at_use(w.astype(x.dtype), w_dims)
    inputs, output = spec.split("->")
    sizes = dict(zip(inputs.replace(",", ""), (*x.shape, *w.shape), strict=True))
    layout = out_spec(out_dims, [sizes[letter] for letter in output])
    return checkpoint_name(_einsum(spec, layout, x, gathered), name)


# Its own gradient rule, since JAX's would multiply the float32 cotangent of the float32 result by
# a bfloat16 operand: twice the bytes, and on a CPU a fifth of the speed. XLA's CPU backend has a
# fast bfloat16 matmul for bfloat16 operands with a float32 result alone.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(spec: str, layout: PartitionSpec | None, x: jax.Array, w: jax.Array) -> jax.Array:
    y = jnp.einsum(spec, x, w, preferred_element_type=jnp.float32, out_sharding=layout)
    return y.astype(x.dtype)


def _forward(
    spec: str, layout: PartitionSpec | None, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum(spec, layout, x, w), (x, w)


def _backward(
    spec: str, layout: PartitionSpec | None, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    inputs, y_dims = spec.split("->")
    x_dims, w_dims = inputs.split(",")
    # Gradients lie as what they are gradients of; no mesh, no layout.
    x_layout, w_layout = (None if layout is None else jax.typeof(a).sharding.spec for a in (x, w))
    grad_x = _einsum(f"{y_dims},{w_dims}->{x_dims}", x_layout, grad, w)
    grad_w = _einsum(f"{x_dims},{y_dims}->{w_dims}", w_layout, x, grad)
    return grad_x, grad_w


_einsum.defvjp(_forward, _backward)
