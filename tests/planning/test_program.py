"""What is read in compiled TPU programs against what they were written to do."""

import re
import time

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from tpu_programs import analysis, compiled, module, on_one

from llama_jax.planning.program_text import ProgramError, parse

PRODUCT = 2 * 128 * 256 * 256


@pytest.fixture(scope="module")
def product():
    """The text of one product of 2048 x 2048 matrices on a v5e."""
    return compiled(lambda a, b: a @ b, on_one(2048, 2048), on_one(2048, 2048)).as_text()


def chain(x, w):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]


@pytest.mark.short
def test_a_scans_products_count_once_a_layer_where_xla_counts_the_loop_once():
    program = compiled(chain, on_one(128, 256), on_one(6, 256, 256))
    found = analysis(program.as_text())
    assert found.dot_flops == found.executed_flops == 6 * PRODUCT
    assert program.cost_analysis()["flops"] < 2 * PRODUCT


def test_the_backward_pass_is_twice_the_forward_and_full_remat_one_more():
    def loss(x, w, remat):
        body = jax.checkpoint(lambda c, w: (jnp.sin(c @ w), None)) if remat else None
        body = body or (lambda c, w: (jnp.sin(c @ w), None))
        return lax.scan(body, x, w)[0].astype(jnp.float32).sum()

    found = [
        analysis(
            compiled(
                lambda x, w, remat=remat: jax.grad(loss, (0, 1))(x, w, remat),
                on_one(128, 256),
                on_one(6, 256, 256),
            ).as_text()
        ).dot_flops
        for remat in (False, True)
    ]
    assert found == [3 * 6 * PRODUCT, 4 * 6 * PRODUCT]


def test_loops_in_loops_multiply():
    def nested(x, w):
        def layer(c, w):
            return lax.fori_loop(0, 5, lambda i, c: jnp.tanh(c @ w), c), None

        return lax.scan(layer, x, w)[0]

    text = compiled(nested, on_one(128, 256), on_one(6, 256, 256)).as_text()
    assert analysis(text).dot_flops == 30 * PRODUCT


def test_a_conditional_counts_its_dearest_branch():
    def either(x, w, n):
        return lax.cond(n > 3, lambda x: jnp.tanh(x @ w[0]) @ w[1], lambda x: x @ w[2], x)

    chosen = on_one(dtype=jnp.int32)
    text = compiled(either, on_one(128, 256), on_one(3, 256, 256), chosen).as_text()
    assert analysis(text).dot_flops == 2 * PRODUCT


def test_products_of_batches_are_counted_through_the_windows_that_they_become():
    def attend(q, k):
        return jnp.einsum("bkgth,bksh->bkgts", q, k)

    text = compiled(attend, on_one(2, 4, 2, 128, 64), on_one(2, 4, 256, 64)).as_text()
    assert analysis(text).dot_flops == 2 * (2 * 4 * 2) * 128 * 256 * 64


def test_products_are_told_apart_by_their_operands_types():
    def mixed(x, y, a, b):
        return lax.dot(x, y, preferred_element_type=jnp.int32), a @ b

    low = (on_one(256, 256, dtype=jnp.int8),) * 2
    text = compiled(mixed, *low, on_one(256, 512), on_one(512, 256)).as_text()
    found = analysis(text)
    assert found.dots_by_type == {"int8": 2 * 256**3, "bf16": 2 * 512 * 256**2}


def test_a_programs_time_is_its_products_cycles_and_its_other_bytes(product):
    found = analysis(product)
    peak_s = 2 * 2048**3 / 197e12
    assert peak_s < found.mxu_s < 1.5 * peak_s
    # Two matrices read, one written; one of the reads is a copy to VMEM ahead of the product.
    assert found.hbm_traffic_bytes == 3 * 2 * 2048**2
    assert found.memory_s == 2 * 2048**2 / 819e9


def test_an_unknown_number_of_cycles_is_the_products_flops_at_peak(product):
    unknown = re.sub(r'"estimated_cycles":"\d+"', f'"estimated_cycles":"{2**63 - 1}"', product)
    assert unknown != product
    assert analysis(unknown).mxu_s == pytest.approx(2 * 2048**3 / 197e12)


def test_the_dearest_parts_are_the_loops_products_and_add_up_to_the_estimate():
    def layers(x, w):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w) @ w, None), x, w)[0]

    found = analysis(compiled(layers, on_one(512, 512), on_one(6, 512, 512)).as_text())
    assert found.parts[0].what == "product"
    products = [part for part in found.parts if part.what == "product"]
    assert {part.count for part in products} == {6}
    assert sum(part.flops for part in products) == found.executed_flops == 6 * 2 * 2 * 512**3
    assert "dot_general" in products[0].path
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.mxu_s + found.memory_s)


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ProgramError, match="no ENTRY computation"):
        parse("HloModule nothing\n")


def test_a_line_that_is_no_instruction_is_refused_by_its_computation():
    text = module("ENTRY %main (a: f32[1]) -> f32[1] {\n  %a = garbage\n}")
    with pytest.raises(ProgramError, match="in main: not an instruction: %a = garbage"):
        parse(text)


def test_a_large_text_is_read_in_seconds():
    text = compiled(chain, on_one(128, 256), on_one(6, 256, 256)).as_text()
    body = text[text.index("\n\n%") : text.index("\n\nENTRY")]
    copies = (body.replace("%", f"%copy{number}_") for number in range(1500))
    large = text.replace("\n\nENTRY", "".join(copies) + "\n\nENTRY")
    assert len(large) > 8e6
    begun_s = time.process_time()
    assert analysis(large).dot_flops == 6 * PRODUCT
    assert time.process_time() - begun_s < 5
