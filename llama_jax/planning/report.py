"""A plan as text, for people: memory, work, collectives, time, and the whole run's costs."""

from collections.abc import Sequence

from llama_jax.planning.costs import ASSUMED_STORAGE_BYTES_PER_S, Costs, error_seen
from llama_jax.planning.plan import BOUNDS, CollectiveUse, Plan

GIB = 2**30
_BOUND_NAMES = {
    "compute": "compute",
    "hbm": "HBM traffic",
    "ici": "ICI, between chips",
    "dcn": "DCN, between slices",
    "host": "PCIe, to the host's memory",
}


def format_plan(plan: Plan, costs: Costs) -> str:
    """The report of `llama-jax plan`."""
    parts = [
        _heading(plan),
        _memory(plan),
        _work(plan),
        _collectives(plan.collectives),
        _time(plan),
        _run(costs),
    ]
    return "\n\n".join(parts)


def memory_categories(plan: Plan) -> dict[str, int]:
    """The peak by what takes it, bytes a chip; they add up to `peak_bytes`."""
    parts = {name.replace("_", " "): size for name, size in plan.memory.items() if size}
    if not parts:
        # The compiler's tables couldn't be read: what is known of the step's arguments.
        parts = {
            "parameters": plan.params_bytes,
            "optimizer state": plan.optimizer_bytes,
            "batch": plan.batch_bytes,
        }
    rest = plan.peak_bytes - sum(parts.values())
    if rest >= 0:
        return {**parts, "everything else": rest}
    # The tables count the whole room of the temporaries, which is never all in use.
    for name in ("unused", "temporaries"):
        taken = min(-rest, parts.get(name, 0))
        parts[name] = parts.get(name, 0) - taken
        rest += taken
    return {name: size for name, size in parts.items() if size}


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns of text: `align` has l or r for each."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def gib(count: float) -> str:
    """`5.61 GiB`."""
    return f"{count / GIB:.2f} GiB"


def scaled(value: float, unit: str) -> str:
    """`421.6 TFLOP`: three or four digits and a decimal prefix."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def seconds(value: float) -> str:
    """`4.67 s`, or milliseconds."""
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"


def _heading(plan: Plan) -> str:
    slices = f"{plan.num_slices} x " if plan.num_slices > 1 else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1 device"
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    return (
        f"{plan.run} on {slices}{plan.slice_name} ({plan.topology}), {plan.num_chips} chips\n"
        f"mesh: {mesh}; {settings}"
    )


def _memory(plan: Plan) -> str:
    rows = [[name, gib(size)] for name, size in memory_categories(plan).items() if size]
    rows.append(["peak", gib(plan.peak_bytes)])
    rows.append(["left of " + gib(plan.hbm_bytes), gib(plan.free_bytes)])
    if plan.host_bytes:
        rows.append(["in the host's memory", gib(plan.host_bytes)])
    return "Memory a chip (compiler's peak)\n" + table(rows, "lr")


def _work(plan: Plan) -> str:
    ratio = plan.executed_flops / plan.model_flops
    kernels = ", ".join(f"{name} {count}" for name, count in sorted(plan.kernel_calls.items()))
    rows = [
        ["model FLOPs", scaled(plan.model_flops, "FLOP")],
        ["executed FLOPs", f"{scaled(plan.executed_flops, 'FLOP')}, {ratio:.3f} of the model's"],
        ["HBM traffic", scaled(plan.hbm_traffic_bytes, "B")],
        ["kernel calls", kernels or "none"],
    ]
    if plan.uncounted_kernels:
        names = ", ".join(f"{name} {n}" for name, n in sorted(plan.uncounted_kernels.items()))
        rows.append(["of unknown FLOPs", f"{names}: not in the figures above"])
    return "Work a chip and step\n" + table(rows, "ll")


def _collectives(uses: Sequence[CollectiveUse]) -> str:
    if not uses:
        return "Collectives: none"
    rows = [["kind", "axis", "count", "bytes", ""]]
    rows += [
        [use.kind, use.axis, str(use.count), scaled(use.bytes, "B"),
         "overlapped" if use.overlapped else "not overlapped"]
        for use in uses
    ]  # fmt: skip
    return "Collectives a chip and step\n" + table(rows, "llrrl")


def _time(plan: Plan) -> str:
    rows = [[_BOUND_NAMES[name], seconds(plan.time_s[name])] for name in BOUNDS]
    rows.append(["estimate", seconds(plan.time_s["estimate"])])
    rows.append(["  with collectives not overlapped", seconds(plan.pessimistic_s)])
    rows.append(["tokens a second a chip", f"{plan.tokens_per_s_per_chip:.0f}"])
    rows.append(["MFU", f"{plan.mfu:.1%}"])
    return f"Time a step, by bound\n{table(rows, 'lr')}\n  {error_seen()}"


def _run(costs: Costs) -> str:
    storage = scaled(costs.storage_bytes_per_s, "B/s")
    known = costs.storage_bytes_per_s != ASSUMED_STORAGE_BYTES_PER_S
    assumed = "" if known else " (assumed; --storage-gb-per-s)"
    rows = [
        ["steps", f"{costs.steps:,} of {costs.tokens / max(costs.steps, 1):,.0f} tokens"],
        ["tokens", scaled(costs.tokens, "tokens")],
        ["time", f"{_duration(costs.hours)}, {costs.chip_hours:,.1f} chip-hours (by the estimate)"],
    ]
    if costs.money is not None:
        rows.append(["money", f"{costs.money:,.0f} at {costs.price_per_chip_hour} a chip-hour"])
    rows += [
        ["checkpoint", f"{scaled(costs.checkpoint_bytes, 'B')}, {costs.saves} saves"],
        [
            "a save",
            f"{seconds(costs.copy_s)} to the hosts at PCIe's rate, then {seconds(costs.write_s)} "
            f"beside the steps at {storage} a VM{assumed}",
        ],
    ]
    note = "" if costs.money is not None else "\n  money: give --price-per-chip-hour"
    return f"The run\n{table(rows, 'll')}{note}"


def _duration(hours: float) -> str:
    if hours < 48:
        return f"{hours:.2f} hours"
    return f"{hours / 24:,.1f} days"
