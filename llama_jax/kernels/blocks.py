"""Block sizes of the TPU attention kernels, by chip and head dim: the one table of them.

A block of queries and a block of keys are what a kernel holds in VMEM at a time.
"""

import dataclasses
import math

LANES = 128  # the kernels ask for whole vector registers of keys


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens of a block, forward and backward; `*_compute` is the piece of one matmul.

    Attributes:
      fused: one backward kernel for the gradients of q, k and v, or two (dq; dk and dv).
    """

    q: int
    kv: int
    kv_compute: int
    q_back: int
    kv_back: int
    kv_back_compute: int
    fused: bool = True


# By JAX's device kind.
TABLE: dict[str, Blocks] = {
    "TPU v4": Blocks(512, 1024, 512, 512, 1024, 512),
    "TPU v5 lite": Blocks(1024, 1024, 512, 1024, 1024, 512),
    "TPU v5": Blocks(1024, 1024, 512, 1024, 1024, 512),
    "TPU v6 lite": Blocks(1024, 1024, 512, 1024, 1024, 512),
    "TPU7x": Blocks(1024, 1024, 512, 1024, 1024, 512),
}
# A kind that isn't in the table, and the CPU's interpreter.
OTHERWISE = Blocks(512, 512, 512, 512, 512, 512)


def blocks_for(device_kind: str, q_len: int, kv_len: int) -> Blocks:
    """The table's row, cut down to blocks that fill rows of these lengths without much padding."""
    row = TABLE.get(device_kind, OTHERWISE)
    q, kv = fitting(row.q, q_len), fitting(row.kv, kv_len)
    q_back, kv_back = fitting(row.q_back, q_len), fitting(row.kv_back, kv_len)
    # One padded length must serve both passes.
    q, q_back = _aligned(q, q_back)
    kv, kv_back = _aligned(kv, kv_back)
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


def _aligned(first: int, second: int) -> tuple[int, int]:
    # Both are the table's figures halved; where one doesn't divide the other, take the smaller.
    small, large = sorted((first, second))
    return (first, second) if large % small == 0 else (small, small)
