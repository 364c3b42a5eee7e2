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


_ROW = Blocks(1024, 1024, 512, 1024, 1024, 512)
_LONG = Blocks(1024, 1024, 512, 1024, 2048, 512)
LONG_FROM = 2**15  # keys
# By chip, largest head dim and least number of keys of the row. What was measured is instruction
# bundles (cycles, but for waits) that the compiler schedules for 1024 x 1024 pairs of a query and
# a key of one head of 128, forward and backward: v4 9943 and 13486, v5e 6176 and 10282, v5p 5812
# and 10258, v6e 4398 and 6688, v7x 4331 and 6168, of which starting and ending a block of queries
# takes some 2000 forward. Blocks of 512 take up to a quarter more (v5e 7828 and 11004, v6e 5276 and
# 7700) and four times the steps; pieces of 256 gain nothing; queries of 2048 by keys of 2048 don't
# fit in the VMEM that a kernel gets. Over long rows 2048 keys backward halve what is held and
# moved of dq's parts, at no more bundles a pair; at 8K the blocks on the diagonal would cost a
# ninth more.
TABLE: dict[tuple[str, int, int], Blocks] = {
    (chip, 128, keys): row
    for chip in ("v4", "v5e", "v5p", "v6e", "tpu7x")
    for keys, row in ((0, _ROW), (LONG_FROM, _LONG))
}
TABLE["v4", 128, LONG_FROM] = dataclasses.replace(_LONG, q_back=512)  # 16 MiB of VMEM are all
# A kind or head dim that isn't in the table, and the interpreter on a CPU.
OTHERWISE = Blocks(512, 512, 512, 512, 512, 512)


def blocks_for(device_kind: str, head_dim: int, q_len: int, kv_len: int) -> Blocks:
    """The table's row, cut down to blocks that fill rows of these lengths without much padding."""
    row = _row(device_kind, head_dim, kv_len)
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


def backward_plan(
    device_kind: str, blocks: Blocks, heads: int, queries_bytes: int, kv_len: int
) -> tuple[Blocks, int]:
    """The blocks, and how many key-value heads the kernels take at a time: a divisor of `heads`.

    Each block of keys leaves its part of the gradient of all queries to be summed afterwards. Held
    for all heads at once that may be much: bounded by a 24th of the chip's memory, by taking some
    heads at a time, and where one head's is too much by two kernels, which leave no parts.

    Args:
      queries_bytes: of the queries of one key-value head.
    """
    chip = chip_of(device_kind)
    if chip is None or not blocks.fused:
        return blocks, heads
    parts_bytes = -(-kv_len // blocks.kv_back) * queries_bytes
    fit = chip.device_usable_hbm_bytes // 24 // parts_bytes
    if fit == 0:
        # The kernel for dq takes a block of keys in one piece, and has no room for a larger one.
        keys = {"kv_back": blocks.kv, "kv_back_compute": blocks.kv_compute}
        return dataclasses.replace(blocks, **keys, fused=False), heads
    return blocks, max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fit)


def _row(device_kind: str, head_dim: int, kv_len: int) -> Blocks:
    chip = chip_of(device_kind)
    rows = {
        (dim, -keys): row
        for (name, dim, keys), row in TABLE.items()
        if chip and name == chip.name and dim >= head_dim and keys <= kv_len
    }
    return rows[min(rows)] if rows else OTHERWISE
