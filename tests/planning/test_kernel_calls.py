"""Attention kernels by name and FLOPs: compiled ones, and texts of other makes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from tpu_programs import analysis, compiled, module, on_one

B, K, G, T, H = 2, 2, 4, 512, 128


@functools.cache
def splash(*, fused):
    """The text of attention's gradients, grouped queries, by JAX's splash kernels."""
    blocks = dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
        + ("block_kv_dkv_compute",)
        + (() if fused else ("block_q_dq", "block_kv_dq")),
        256,
    )
    kernel = splash_attention_kernel.make_splash_mqa(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * G),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(**blocks, use_fused_bwd_kernel=fused),
    )

    def loss(q, k, v):
        return jax.vmap(jax.vmap(kernel))(q, k, v).astype(jnp.float32).sum()

    keys = on_one(B, K, T, H)
    return compiled(jax.grad(loss, (0, 1, 2)), on_one(B, K, G, T, H), keys, keys).as_text()


def kinds(found):
    return sorted(name.split("_")[2] for name in found.kernel_calls)


def test_a_fused_backward_pass_is_five_products_beside_the_forwards_two():
    found = analysis(splash(fused=True))
    product = 2 * B * K * G * T * T * H
    assert found.attention_flops == found.executed_flops == (2 + 5) * product // 2
    assert kinds(found) == ["dkv", "fwd"]
    assert set(found.kernel_calls.values()) == {1}
    assert not any(found.uncounted_kernels.values())


def test_separate_kernels_for_dq_and_dkv_redo_two_products():
    found = analysis(splash(fused=False))
    assert found.attention_flops == (2 + 3 + 4) * 2 * B * K * G * T * T * H // 2
    assert kinds(found) == ["dkv", "dq", "fwd"]


def test_a_fused_backward_pass_is_known_by_its_results_where_no_metadata_says_it():
    found = [
        analysis(splash(fused=fused).replace("use_fused_bwd_kernel", "nothing")).attention_flops
        for fused in (False, True)
    ]
    assert found == [9 * B * K * G * T * T * H, 7 * B * K * G * T * T * H]


def test_without_a_causal_mask_all_pairs_count():
    text = splash(fused=True)
    assert analysis(text, causal=False).executed_flops == 2 * analysis(text).executed_flops


CALL = """ENTRY %main (q: bf16[2,8,512,128], k: bf16[2,8,2048,128]) -> bf16[2,8,512,128] {{
  %q = bf16[2,8,512,128]{{3,2,1,0}} parameter(0)
  %k = bf16[2,8,2048,128]{{3,2,1,0}} parameter(1)
  ROOT %{name} = bf16[2,8,512,128]{{3,2,1,0}} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/{op}/pallas_call"}}, backend_config={{{config}}}
}}"""  # noqa: E501


def called(name, *, op="f", config=""):
    return analysis(module(CALL.format(name=name, op=op, config=config)))


def test_fewer_queries_than_keys_count_as_a_share_of_the_pairs():
    found = called("splash_mha_fwd.7")
    assert found.kernel_calls == {"splash_mha_fwd": 1}
    assert found.attention_flops == 2 * 2 * 2 * 8 * 512 * 2048 * 128 // 2


def test_keys_of_one_head_have_two_dimensions():
    text = CALL.format(name="splash_mqa_dkv", op="f", config="")
    found = analysis(module(text.replace("2,8,2048,128]{3,2,1,0}", "2048,128]{1,0}")))
    assert found.attention_flops == 4 * 2 * 2 * 8 * 512 * 2048 * 128 // 2


def test_operands_that_are_no_queries_keys_and_values_are_not_guessed_at():
    text = CALL.format(name="splash_mqa_dkv", op="f", config="").replace(
        "(%q, %k, %k)", "(%k, %q, %k)"
    )
    assert analysis(module(text)).uncounted_kernels == {"splash_mqa_dkv": 1}


def test_a_call_without_a_name_of_its_own_has_its_paths():
    assert called("custom-call.3", op="flash_attention").kernel_calls == {"flash_attention": 1}


def test_another_kernels_flops_are_what_it_says_of_itself():
    found = called("cross_entropy.1", config='"cost_estimate":{"flops":"123","bytes_accessed":"9"}')
    assert (found.attention_flops, found.executed_flops) == (0, 123)
    # It counts as bytes in the estimate, not as attention.
    assert found.memory_s == (2 * 2 * 8 * 512 * 128 * 2 + 2 * 2 * 8 * 2048 * 128 * 2) / 819e9


def test_a_kernel_of_unknown_flops_is_said_to_be_one():
    found = called("gated_linear_unit.1")
    assert found.executed_flops == 0
    assert found.uncounted_kernels == {"gated_linear_unit": 1}
    assert called("cross_entropy.1").uncounted_kernels == {"cross_entropy": 1}


@pytest.mark.parametrize(("name", "products"), [("splash_mha_dq", 3), ("flash_mha_bwd_dkv", 4)])
def test_kernels_are_told_apart_by_name(name, products):
    assert called(name).attention_flops == products * 2 * 8 * 512 * 2048 * 128
