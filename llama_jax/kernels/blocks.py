"""Block sizes of the TPU attention kernels, by chip and head dim: the one table of them.

A block of queries and a block of keys are what a kernel holds in VMEM at a time. How the rows were
measured, without a TPU: docs/performance.md.
"""

import dataclasses
import math

from llama_jax.config.hardware import chip_of

LANES = 128  # the kernels ask for whole vector registers of keys


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens of a block, forward and backward; `*_compute` is the piece of one matmul.

    Attributes:
      fused: one backward kernel for the gradients of q, k and v, or two (dq; dk and dv) which take
        seven matmuls a pair of blocks instead of five.
    """

    q: int
    kv: int
    kv_compute: int
    q_back: int
    kv_back: int
    kv_back_compute: int
    fused: bool = True


_1024 = Blocks(1024, 1024, 512, 1024, 1024, 512)
# By chip and the largest head dim of the row. Instruction bundles that the compiler schedules for
# 1024 x 1024 query-key pairs of one head of 128, forward and backward: with blocks of 1024, v5e
# 6176 and 10282, v5p 5812 and 10258, v6e 4398 and 6688; with blocks of 512, v5e 7828 and 11004,
# v5p 7152 and 11248, v6e 5276 and 7700. Pieces of 256 instead of 512 gain nothing. Blocks of 2048
# don't fit the VMEM that a kernel gets by default. v4 and v7x have VMEM like v5p or more.
TABLE: dict[tuple[str, int], Blocks] = {
    ("v4", 128): Blocks(512, 1024, 512, 512, 1024, 512),
    ("v5e", 128): _1024,
    ("v5p", 128): _1024,
    ("v6e", 128): _1024,
    ("tpu7x", 128): _1024,
}
# A kind or head dim that isn't in the table, and the interpreter on a CPU.
OTHERWISE = Blocks(512, 512, 512, 512, 512, 512)


def blocks_for(device_kind: str, head_dim: int, q_len: int, kv_len: int) -> Blocks:
    """The table's row, cut down to blocks that fill rows of these lengths without much padding."""
    row = _row(device_kind, head_dim)
    q, kv = fitting(row.q, q_len), fitting(row.kv, kv_len)
    # One padded length must serve both passes: both are halvings, the smaller divides the larger.
    q_back, kv_back = fitting(row.q_back, q_len), fitting(row.kv_back, kv_len)
    return Blocks(
        q,
        kv,
        math.gcd(kv, row.kv_compute),
        q_back,
        kv_back,
        math.gcd(kv_back, row.kv_back_compute),
        row.fused,
    )


def fitting(block: int, length: int) -> int:
    """The largest halving of `block` that adds at most an eighth of padding to the length."""
    while block > LANES and -length % block > length // 8:
        block //= 2
    return block


def heads_at_once(device_kind: str, heads: int, bytes_a_head: int) -> int:
    """How many key-value heads the fused backward kernel takes at a time: a divisor of `heads`.

    Each block of keys leaves its part of the gradient of all queries, summed afterwards; held for
    all heads at once that may be much. Bounded by a 32nd of the chip's memory.

    Args:
      bytes_a_head: of those parts, for one key-value head.
    """
    chip = chip_of(device_kind)
    if chip is None:
        return heads
    fit = max(1, chip.device_usable_hbm_bytes // 32 // bytes_a_head)
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fit)


def _row(device_kind: str, head_dim: int) -> Blocks:
    chip = chip_of(device_kind)
    rows = {dim: row for (name, dim), row in TABLE.items() if chip and name == chip.name}
    fit = [dim for dim in rows if dim >= head_dim]
    return rows[min(fit)] if fit else OTHERWISE
