"""Losses before a head that isn't trained: the same gradients of x, and no product for the head."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.run import MeshConfig
from llama_jax.losses.cross_entropy import chunked_cross_entropy
from llama_jax.losses.distillation import LiveTeacher, distillation_loss
from llama_jax.losses.matching import Matching
from llama_jax.losses.token_logps import token_logps
from llama_jax.sharding.mesh import make_mesh
from llama_jax.sharding.rules import lay_out

B, T, D, V = 4, 8, 16, 32


def cross_entropy(x_BTD, head_DV, targets_BT):
    ones_BT = jnp.ones_like(targets_BT, jnp.float32)
    return chunked_cross_entropy(x_BTD, head_DV, targets_BT, ones_BT, z_loss=1e-3, chunk_size=8)[0]


def squared_logps(x_BTD, head_DV, targets_BT):
    return (token_logps(x_BTD, head_DV, targets_BT, chunk_size=8) ** 2).sum()


def divergence(x_BTD, head_DV, targets_BT):
    ones_BT = jnp.ones_like(targets_BT, jnp.float32)
    teacher = LiveTeacher(2.0 * jax.lax.stop_gradient(x_BTD), jax.lax.stop_gradient(head_DV))
    return distillation_loss(
        x_BTD, head_DV, teacher, targets_BT, ones_BT, matching=Matching(), chunk_size=8
    )[0]


LOSSES = pytest.mark.parametrize("loss", [cross_entropy, squared_logps, divergence])


@functools.cache
def arrays():
    random = np.random.default_rng(0)
    x_BTD, head_DV = (random.standard_normal(s).astype(np.float32) for s in ((B, T, D), (D, V)))
    return x_BTD, head_DV, random.integers(0, V, (B, T)).astype(np.int32)


@LOSSES
@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, tensor=2)], ids=["plain", "mesh"])
def test_the_gradient_of_x_is_the_same(loss, mesh):
    def laid_out(x_BTD, head_DV, targets_BT):
        head_DV = lay_out(head_DV, ("embed", "loss_vocab"))
        x_BTD = lay_out(x_BTD, ("batch", "length", "embed"))
        return loss(x_BTD, head_DV, lay_out(targets_BT, ("batch", "length")))

    devices = make_mesh(mesh or MeshConfig(), jax.devices()[: 4 if mesh else 1])
    with jax.set_mesh(devices):
        both = jax.jit(jax.grad(laid_out, argnums=(0, 1)))(*arrays())
        alone = jax.jit(jax.grad(laid_out))(*arrays())
    assert np.abs(both[1]).max() > 0.1
    np.testing.assert_allclose(alone, both[0], atol=1e-6)


@LOSSES
def test_a_frozen_head_has_no_product_for_its_gradient(loss):
    def products(argnums):
        jaxpr = str(jax.make_jaxpr(jax.grad(loss, argnums=argnums))(*arrays()))
        return len(re.findall(r"\bdot_general\[", jaxpr))

    assert products((0, 1)) - products((0,)) == 1
