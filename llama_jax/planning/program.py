"""What a compiled step does, a device and step: FLOPs, bytes, collectives and kernels.

Walks from the entry through fusions, calls and loops, each loop times its trip count, which the
compiler's own cost analysis doesn't; a conditional counts its dearest branch.
"""

import dataclasses
from collections import Counter

from llama_jax.config.hardware import Chip
from llama_jax.planning import traffic
from llama_jax.planning.collectives import Collective, Layout, collective, merge
from llama_jax.planning.flops import matmul_flops, matmul_type
from llama_jax.planning.kernel_calls import kernel
from llama_jax.planning.loops import trip_count
from llama_jax.planning.program_cost import Cost, Part, part_of
from llama_jax.planning.program_text import Computation, Instruction, Program, parse

_PARTS = 40


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A compiled step by what it does; figures are a JAX device's and a step's.

    Attributes:
      executed_flops: of matrix products and of attention kernels, recomputation included.
      dot_flops: of matrix products outside kernels.
      dots_by_type: the same by what units they run on: "bf16", "int8", "fp8".
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
      parts: the instructions that take most of the estimate, the dearest first.
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
    parts: tuple[Part, ...] = ()
    dots_by_type: dict[str, int] = dataclasses.field(default_factory=dict)


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
        parts=walk.dearest(_PARTS),
        dots_by_type=dict(cost.dots),
    )


class _Walk:
    """Costs of computations, each worked out once."""

    def __init__(self, program: Program, chip: Chip, layout: Layout, causal: bool) -> None:
        self.program, self.loops = program, dict[str, int]()
        self._chip, self._layout, self._causal = chip, layout, causal
        self._traffic = traffic.Counter(program)
        self._costs: dict[str, Cost] = {}
        # Of each computation: what its own instructions do, and what it calls how often.
        self._charges: dict[str, list[tuple[Instruction, Cost]]] = {}
        self._calls: dict[str, Counter[str]] = {}
        self._fused: dict[str, Counter[str]] = {}

    def cost(self, name: str) -> Cost:
        """Everything that one run of a computation does."""
        if name not in self._costs:
            cost, where = Cost(), self.program.computations[name]
            for instruction in where.instructions.values():
                self._run(cost, where, instruction)
            self._costs[name] = cost
        return self._costs[name]

    def dearest(self, number: int) -> tuple[Part, ...]:
        """The instructions that take longest over all their runs."""
        runs = Counter({self.program.entry: 1})
        # Callers are worked out after what they call, so that backwards each has its final count.
        for name in reversed(self._costs):
            for called, times in self._calls.get(name, {}).items():
                runs[called] += times * runs[name]
        parts = (
            part_of(instruction, cost, runs[name], self._chip)
            for name, charges in self._charges.items()
            for instruction, cost in charges
        )
        return tuple(sorted(parts, key=lambda part: -part.seconds)[:number])

    def _run(self, cost: Cost, where: Computation, instruction: Instruction) -> None:
        if instruction.opcode == "while":
            trips = trip_count(self.program, where, instruction)
            self.loops[instruction.name] = trips
            self._call(cost, where, instruction.called["body"], trips)
            self._call(cost, where, instruction.called["condition"], trips + 1)
        elif instruction.opcode == "conditional":
            branches = instruction.listed
            dearest = max(branches, key=lambda name: self.cost(name).seconds(self._chip))
            self._call(cost, where, dearest)
        elif instruction.opcode in ("call", "async-start"):
            self._call(cost, where, next(iter(instruction.called.values())))
        elif instruction.opcode == "custom-call" and instruction.listed:
            for name in instruction.listed:
                self._call(cost, where, name)
        else:
            self._collect(cost, where, instruction)
            charge = self._charge(where, instruction)
            cost.add(charge)
            self._charges.setdefault(where.name, []).append((instruction, charge))

    def _call(self, cost: Cost, where: Computation, name: str, times: int = 1) -> None:
        cost.add(self.cost(name), times)
        self._calls.setdefault(where.name, Counter())[name] += times

    def _collect(self, cost: Cost, where: Computation, instruction: Instruction) -> None:
        """Collectives, also those inside a fusion."""
        found = collective(self.program, where, instruction, self._layout)
        if found is not None:
            cost.collectives.append(found)
        if instruction.opcode == "fusion":
            inner = self.program.computations[instruction.called["calls"]]
            for each in inner.instructions.values():
                self._collect(cost, inner, each)

    def _charge(self, where: Computation, instruction: Instruction) -> Cost:
        """FLOPs, cycles and bytes of one instruction."""
        cost = Cost()
        moved = self._traffic.traffic(where, instruction)
        cost.host_bytes += moved.host
        found = kernel(where, instruction, causal=self._causal)
        if found is not None:
            cost.kernels[found.name] += 1
            cost.uncounted[found.name] += found.flops is None
        dots = self._dots(where, instruction)
        if found is not None and found.attention:
            cost.attention_flops += found.flops or 0
            cost.attention_bytes += moved.hbm
        elif dots:
            cost.dots.update(dots)
            cost.mxu_bytes += moved.hbm
            cycles = instruction.estimated_cycles
            cost.mxu_cycles += cycles or 0
            cost.unestimated_flops += dots.total() if cycles is None else 0
        else:
            cost.other_kernel_flops += (found.flops or 0) if found is not None else 0
            cost.other_bytes += moved.hbm
        return cost

    def _dots(self, where: Computation, instruction: Instruction) -> Counter[str]:
        """FLOPs of the matrix products in an instruction, by their type."""
        if instruction.opcode != "fusion":
            flops = matmul_flops(where, instruction)
            return Counter({matmul_type(where, instruction): flops} if flops else {})
        name = instruction.called["calls"]
        if name not in self._fused:
            inner = self.program.computations[name]
            found: Counter[str] = Counter()
            for each in inner.instructions.values():
                found.update(self._dots(inner, each))
            self._fused[name] = found
        return self._fused[name]
