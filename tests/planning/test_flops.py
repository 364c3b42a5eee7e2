"""FLOPs of single products against counts by hand and by NumPy's own sliding."""

import itertools

import pytest
from tpu_programs import module

from llama_jax.planning.flops import matmul_flops
from llama_jax.planning.program_text import ProgramError, parse


def flops(left, right, out, operation):
    program = parse(
        module(
            f"""ENTRY %main (a: f32[1]) -> f32[1] {{
  %a = bf16[{left}]{{0}} parameter(0)
  %b = bf16[{right}]{{0}} parameter(1)
  ROOT %c = f32[{out}]{{0}} {operation}
}}"""
        )
    )
    where = program.computations["main"]
    return matmul_flops(where, where.instructions["c"])


def test_a_dot_is_two_flops_a_product():
    found = flops(
        "4,8,16", "4,16,32", "4,8,32",
        "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}",
    )  # fmt: skip
    assert found == 2 * 4 * 8 * 16 * 32


def test_a_plain_product_written_as_a_convolution():
    found = flops(
        "8192,4096", "4096,14336", "8192,14336", "convolution(%a, %b), dim_labels=bf_io->bf"
    )
    assert found == 2 * 8192 * 4096 * 14336


def test_a_batched_product_written_as_a_dilated_window_counts_the_diagonal_only():
    # 8 products of [2048, 128] by [128, 512]: dilation by 8 with stride 7 meets the input once an
    # output.
    found = flops(
        "8,2048,128", "8,512,128", "8,2048,512",
        "convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf",
    )  # fmt: skip
    assert found == 8 * 2 * 2048 * 128 * 512


@pytest.mark.parametrize(
    ("size", "stride", "pad", "lhs_dilate", "rhs_dilate", "in_size"),
    [
        (3, 1, (1, 1), 1, 1, 10),
        (3, 2, (0, 1), 1, 1, 9),
        (4, 1, (3, 3), 1, 1, 4),
        (5, 3, (7, 7), 2, 1, 6),
        (3, 1, (2, 2), 1, 2, 8),
        (2, 2, (-1, 0), 3, 2, 7),
    ],
)
def test_only_positions_inside_the_input_count(size, stride, pad, lhs_dilate, rhs_dilate, in_size):
    low, high = pad
    width = (in_size - 1) * lhs_dilate + 1 + low + high
    out_size = (width - (size - 1) * rhs_dilate - 1) // stride + 1
    # The dilated and padded input written out, and the window laid over it at each place.
    there = [
        0 <= place - low <= (in_size - 1) * lhs_dilate and (place - low) % lhs_dilate == 0
        for place in range(width)
    ]
    met = sum(
        there[at * stride + element * rhs_dilate]
        for at, element in itertools.product(range(out_size), range(size))
    )
    window = (
        f"size={size} stride={stride} pad={low}_{high} "
        f"lhs_dilate={lhs_dilate} rhs_dilate={rhs_dilate}"
    )
    found = flops(
        f"2,3,{in_size}", f"5,3,{size}", f"2,5,{out_size}",
        f"convolution(%a, %b), window={{{window}}}, dim_labels=bf0_oi0->bf0",
    )  # fmt: skip
    assert found == 2 * 2 * 3 * 5 * met


def test_dimensions_of_a_window_multiply():
    found = flops(
        "1,8,8,4", "3,1,4,6", "1,8,8,6",
        "convolution(%a, %b), window={size=3x1 pad=1_1x0_0}, dim_labels=b01f_01io->b01f",
    )  # fmt: skip
    assert found == 2 * 4 * 6 * 8 * (3 * 8 - 2)


def test_anything_else_is_nothing_and_an_unreadable_product_an_error():
    assert flops("8", "8", "8", "add(%a, %b)") == 0
    with pytest.raises(ProgramError, match="convolution c without dim_labels"):
        flops("8,8", "8,8", "8,8", "convolution(%a, %b)")
