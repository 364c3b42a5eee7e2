"""What a piece of a program does, added up, and how long its dearest instructions take."""

import dataclasses
import re
from collections import Counter
from typing import Literal

from llama_jax.config.hardware import Chip
from llama_jax.planning.collectives import Collective
from llama_jax.planning.program_text import Instruction

_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass
class Cost:
    """Sums over what a computation runs."""

    dots: Counter[str] = dataclasses.field(default_factory=Counter)  # FLOPs by operands' type
    attention_flops: int = 0
    other_kernel_flops: int = 0
    mxu_cycles: int = 0
    unestimated_flops: int = 0  # of matrix products without an estimate of their cycles
    mxu_bytes: int = 0
    attention_bytes: int = 0
    other_bytes: int = 0
    host_bytes: int = 0
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    uncounted: Counter[str] = dataclasses.field(default_factory=Counter)
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Add another's sums, so many times."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, int):
                setattr(self, field.name, mine + times * theirs)
            elif isinstance(mine, Counter):
                mine.update({key: times * count for key, count in theirs.items()})
        self.collectives += [each.times(times) for each in other.collectives]

    @property
    def dot_flops(self) -> int:
        """FLOPs of matrix products of all types."""
        return self.dots.total()

    def seconds(self, chip: Chip) -> float:
        """What the parts take one after the other, to tell a conditional's branches apart."""
        peak = chip.device_peak_flops() or 1.0
        kernels = self.attention_flops / chip.pallas_attention_efficiency
        moved = self.other_bytes / chip.device_hbm_bytes_per_s
        return self.mxu_s(chip) + kernels / peak + moved

    def mxu_s(self, chip: Chip) -> float:
        """Matrix products: estimated cycles, and FLOPs at peak where there is no estimate."""
        rest = self.unestimated_flops / (chip.device_peak_flops() or 1.0)
        return self.mxu_cycles / chip.clock_hz + rest


@dataclasses.dataclass(frozen=True)
class Part:
    """One instruction over all its runs in a step.

    Attributes:
      path: the operation in the model's source that it comes from, "" where the text has none.
      what: what its seconds are of: a matrix product, an attention kernel, or HBM bytes.
    """

    name: str
    path: str
    what: Literal["product", "attention", "memory"]
    count: int
    seconds: float
    flops: int
    hbm_bytes: int


def part_of(instruction: Instruction, cost: Cost, count: int, chip: Chip) -> Part:
    """An instruction's part in a step that runs it `count` times."""
    flops = cost.dot_flops + cost.attention_flops + cost.other_kernel_flops
    path = _OP_NAME.search(instruction.attributes)
    what = "attention" if cost.attention_bytes else "product" if cost.dot_flops else "memory"
    return Part(
        name=instruction.name,
        path=path[1] if path else "",
        what=what,
        count=count,
        seconds=count * cost.seconds(chip),
        flops=count * flops,
        hbm_bytes=count * (cost.mxu_bytes + cost.attention_bytes + cost.other_bytes),
    )
