"""The FLOPs read in the compiled step of `train` against the model's own formula."""

import dataclasses

import pytest
from tiny_runs import TINY
from tpu_programs import devices

from llama_jax.config.hardware import find_slice
from llama_jax.models.accounting import matmul_params
from llama_jax.planning.collectives import Layout
from llama_jax.planning.compiling import compile_step
from llama_jax.planning.program import analyze

MODEL = TINY.model
TOKENS = TINY.data.batch_size * TINY.data.seq_len // 4


def dot_flops(remat):
    devices("v5e:2x2")
    execution = dataclasses.replace(TINY.execution, remat=remat)
    slice_ = find_slice("v5e-4")
    compiled = compile_step(dataclasses.replace(TINY, execution=execution), slice_, 1, {})
    return analyze(compiled.text, slice_.chip, Layout.of(compiled.mesh)).dot_flops


def forward_flops():
    """2 N T, and all pairs of the reference attention."""
    pairs = 4 * TINY.data.seq_len * MODEL.num_heads * MODEL.head_dim * MODEL.num_layers
    return (2 * matmul_params(MODEL) + pairs) * TOKENS


def test_without_remat_a_step_is_three_forwards_to_the_flop():
    assert dot_flops("none") == 3 * forward_flops()


@pytest.mark.slow
def test_full_remat_is_one_more_forward_of_the_layers_but_for_each_layers_last_product():
    head = 2 * MODEL.vocab_size * MODEL.embed_dim * TOKENS
    last = 2 * MODEL.num_layers * MODEL.embed_dim * MODEL.mlp_dim * TOKENS
    assert dot_flops("full") == 4 * forward_flops() - head - last
