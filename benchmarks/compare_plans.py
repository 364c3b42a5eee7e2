"""The benchmark programs beside MaxText's, from the stored plans: tables of docs/performance.md.

  python benchmarks/compare_plans.py          prints them

MaxText's figures: its training step of 2026-08-22 (commit e591f30c), compiled for the same
topologies by the same libtpu 0.0.52, with the same batch a chip, float32 weights and moments, FSDP
over all chips, splash attention; read by the same method. `full` recomputes everything; where its
best is another program, that is its published recipe.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from llama_jax.planning.plan import read_plan

PLANS = Path(__file__).parents[1] / "tests" / "planning" / "plans" / "bench"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Peer:
    """MaxText's program: peak and executed/model FLOPs with full remat, seconds at its best."""

    best_s: float
    peak_gib: float | None = None
    executed: float | None = None
    # What the links take, were nothing hidden.
    ici_s: float | None = None


PEERS = {
    "llama2-7b-v5e-16": Peer(0.79, 8.12, 1.277, 0.46),
    "llama3.1-8b-v5e-16": Peer(4.67, 14.37, 1.343, 0.57),
    "llama3.1-8b-v5p-8": Peer(3.60, 40.51, 1.343, 0.26),
    "llama3.1-8b-v6e-16": Peer(3.12, 20.82, 1.302, 0.35),
    "llama3.1-70b-v5p-128": Peer(27.61, 48.62, 1.290, 1.04),
    "llama3.1-405b-v5p-1024": Peer(122.84),
}
# What was aimed at: of the peer's peak, and of its time.
PEAK, TIME, EXECUTED = 0.85, 0.85, 1.15


def main() -> None:
    """Both tables."""
    print("\n".join(full_table()))
    print()
    print("\n".join(best_table()))


def full_table() -> Iterator[str]:
    """With everything recomputed: memory and FLOPs."""
    yield (
        "| program, full remat | peak GiB | MaxText | ratio (aim 0.85) | executed / model FLOPs |"
        " MaxText | ICI s | MaxText | estimate s |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, peer in PEERS.items():
        plan = read_plan(PLANS / f"{name}-full.json")
        peak = plan.peak_bytes / GIB
        ratio = "-" if peer.peak_gib is None else _judged(peak / peer.peak_gib, PEAK, ".2f")
        yield _row(
            name,
            f"{peak:.2f}",
            _shown(peer.peak_gib, ".2f"),
            ratio,
            f"{plan.executed_flops / plan.model_flops:.3f}",
            _shown(peer.executed, ".3f"),
            f"{plan.time_s['ici']:.2f}",
            _shown(peer.ici_s, ".2f"),
            f"{plan.time_s['estimate']:.2f}",
        )


def best_table() -> Iterator[str]:
    """With what fits kept: time."""
    yield (
        "| program, what fits kept | peak GiB | host GiB | executed / model FLOPs (aim 1.15) |"
        " estimate s | MaxText's best | ratio (aim 0.85) | exposed collectives s |"
        " host transfers s |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, peer in PEERS.items():
        plan = read_plan(PLANS / f"{name}.json")
        yield _row(
            name,
            f"{plan.peak_bytes / GIB:.2f} of {plan.hbm_bytes / GIB:.2f}",
            f"{plan.host_bytes / GIB:.1f}",
            _judged(plan.executed_flops / plan.model_flops, EXECUTED, ".3f"),
            f"{plan.time_s['estimate']:.2f}",
            f"{peer.best_s:.2f}",
            _judged(plan.time_s["estimate"] / peer.best_s, TIME, ".2f"),
            f"{plan.time_s['exposed']:.2f}",
            f"{plan.time_s['host']:.1f}",
        )


def _judged(value: float, aim: float, form: str) -> str:
    shown = format(value, form)
    # By what is shown, so that the mark doesn't contradict it.
    return f"{shown}" if float(shown) <= aim else f"**{shown}**"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
