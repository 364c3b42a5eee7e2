"""What a compiled step does, a device and step: FLOPs, bytes, collectives and kernels.

Walks from the entry through fusions, calls and loops, each loop times its trip count, which the
compiler's own cost analysis doesn't; a conditional counts its dearest branch.
"""

import dataclasses
from collections import Counter

from llama_jax.config.hardware import Chip
from llama_jax.planning import traffic
from llama_jax.planning.collectives import Collective, Layout, collective, merge
from llama_jax.planning.flops import matmul_flops
from llama_jax.planning.kernel_calls import kernel
from llama_jax.planning.loops import trip_count
from llama_jax.planning.program_text import Computation, Instruction, Program, parse


@dataclasses.dataclass
class _Cost:
    """Sums over what a computation runs."""

    dot_flops: int = 0
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

    def add(self, other: "_Cost", times: int = 1) -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, int):
                setattr(self, field.name, mine + times * theirs)
            elif isinstance(mine, Counter):
                mine.update({key: times * count for key, count in theirs.items()})
        self.collectives += [each.times(times) for each in other.collectives]

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
class Analysis:
    """A compiled step by what it does; figures are a JAX device's and a step's.

    Attributes:
      executed_flops: of matrix products and of attention kernels, recomputation included.
      dot_flops: of matrix products outside kernels.
      attention_flops: of attention kernels, by formula.
      kernel_flops: of all kernels: attention, and what others say of themselves.
      hbm_traffic_bytes: read and written in HBM.
      host_traffic_bytes: moved to or from the host's memory.
      collectives: by kind, axis and form.
      kernel_calls: Pallas kernels run, by name.
      uncounted_kernels: those among them whose FLOPs aren't known.
      loops: trip count of each loop, by the loop's name.
      mxu_s: the compiler's estimate of the fusions that hold matrix products.
      memory_s: HBM bytes of all else but attention kernels, over the bandwidth.
    """

    executed_flops: int
    dot_flops: int
    attention_flops: int
    kernel_flops: int
    hbm_traffic_bytes: int
    host_traffic_bytes: int
    collectives: tuple[Collective, ...]
    kernel_calls: dict[str, int]
    uncounted_kernels: dict[str, int]
    loops: dict[str, int]
    mxu_s: float
    memory_s: float


def analyze(text: str, chip: Chip, layout: Layout, *, causal: bool = True) -> Analysis:
    """Read the optimised text of a step.

    Args:
      text: what `as_text()` of a compiled program gives, or XLA's dump after optimisations.
      chip: what it was compiled for.
      layout: the mesh; `Layout.of(mesh)`.
      causal: whether attention kernels skip half of the pairs.

    Raises:
      ProgramError: the text can't be read; `LoopError` for a loop of unknown length.
    """
    walk = _Walk(parse(text), chip, layout, causal)
    cost = walk.cost(walk.program.entry)
    kernel_flops = cost.attention_flops + cost.other_kernel_flops
    return Analysis(
        executed_flops=cost.dot_flops + kernel_flops,
        dot_flops=cost.dot_flops,
        attention_flops=cost.attention_flops,
        kernel_flops=kernel_flops,
        hbm_traffic_bytes=cost.mxu_bytes + cost.attention_bytes + cost.other_bytes,
        host_traffic_bytes=cost.host_bytes,
        collectives=merge(cost.collectives),
        kernel_calls=dict(cost.kernels),
        uncounted_kernels=dict(+cost.uncounted),
        loops=walk.loops,
        mxu_s=cost.mxu_s(chip),
        memory_s=cost.other_bytes / chip.device_hbm_bytes_per_s,
    )


class _Walk:
    """Costs of computations, each worked out once."""

    def __init__(self, program: Program, chip: Chip, layout: Layout, causal: bool) -> None:
        self.program, self.loops = program, dict[str, int]()
        self._chip, self._layout, self._causal = chip, layout, causal
        self._traffic = traffic.Counter(program)
        self._costs: dict[str, _Cost] = {}
        self._fused: dict[str, int] = {}

    def cost(self, name: str) -> _Cost:
        """Everything that one run of a computation does."""
        if name not in self._costs:
            cost, where = _Cost(), self.program.computations[name]
            for instruction in where.instructions.values():
                self._run(cost, where, instruction)
            self._costs[name] = cost
        return self._costs[name]

    def _run(self, cost: _Cost, where: Computation, instruction: Instruction) -> None:
        if instruction.opcode == "while":
            self._loop(cost, where, instruction)
        elif instruction.opcode == "conditional":
            branches = [self.cost(name) for name in instruction.listed]
            cost.add(max(branches, key=lambda branch: branch.seconds(self._chip)))
        elif instruction.opcode in ("call", "async-start"):
            cost.add(self.cost(next(iter(instruction.called.values()))))
        elif instruction.opcode == "custom-call" and instruction.listed:
            for name in instruction.listed:
                cost.add(self.cost(name))
        else:
            self._collect(cost, where, instruction)
            self._charge(cost, where, instruction)

    def _loop(self, cost: _Cost, where: Computation, instruction: Instruction) -> None:
        trips = trip_count(self.program, where, instruction)
        self.loops[instruction.name] = trips
        cost.add(self.cost(instruction.called["body"]), trips)
        cost.add(self.cost(instruction.called["condition"]), trips + 1)

    def _collect(self, cost: _Cost, where: Computation, instruction: Instruction) -> None:
        """Collectives, also those inside a fusion."""
        found = collective(self.program, where, instruction, self._layout)
        if found is not None:
            cost.collectives.append(found)
        if instruction.opcode == "fusion":
            inner = self.program.computations[instruction.called["calls"]]
            for each in inner.instructions.values():
                self._collect(cost, inner, each)

    def _charge(self, cost: _Cost, where: Computation, instruction: Instruction) -> None:
        """FLOPs, cycles and bytes of one instruction."""
        moved = self._traffic.traffic(where, instruction)
        cost.host_bytes += moved.host
        found = kernel(where, instruction, causal=self._causal)
        if found is not None:
            cost.kernels[found.name] += 1
            cost.uncounted[found.name] += found.flops is None
        flops = self._flops(where, instruction)
        if found is not None and found.attention:
            cost.attention_flops += found.flops or 0
            cost.attention_bytes += moved.hbm
        elif flops:
            cost.dot_flops += flops
            cost.mxu_bytes += moved.hbm
            cycles = instruction.estimated_cycles
            cost.mxu_cycles += cycles or 0
            cost.unestimated_flops += flops if cycles is None else 0
        else:
            cost.other_kernel_flops += (found.flops or 0) if found is not None else 0
            cost.other_bytes += moved.hbm

    def _flops(self, where: Computation, instruction: Instruction) -> int:
        if instruction.opcode != "fusion":
            return matmul_flops(where, instruction)
        name = instruction.called["calls"]
        if name not in self._fused:
            inner = self.program.computations[name]
            self._fused[name] = sum(
                self._flops(inner, each) for each in inner.instructions.values()
            )
        return self._fused[name]
