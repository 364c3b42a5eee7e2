"""Two plans side by side: what a change does to memory, FLOPs, traffic and time."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from llama_jax.planning.plan import BOUNDS, Plan
from llama_jax.planning.report import gib, memory_categories, scaled, seconds, table


class Change(NamedTuple):
    """One figure of both plans."""

    name: str
    unit: str  # GiB, FLOP, B, s, "" for a count
    before: float
    after: float


def changes(before: Plan, after: Plan) -> list[Change]:
    """Every figure that either plan has, in the order of the report."""
    return [
        *_memory(before, after),
        Change("model FLOPs", "FLOP", before.model_flops, after.model_flops),
        Change("executed FLOPs", "FLOP", before.executed_flops, after.executed_flops),
        Change("HBM traffic", "B", before.hbm_traffic_bytes, after.hbm_traffic_bytes),
        *_collectives(before, after),
        *_counts("kernel", before.kernel_calls, after.kernel_calls),
        *(
            Change(f"time, {name}", "s", before.time_s[name], after.time_s[name])
            for name in (*BOUNDS, "exposed", "estimate")
        ),
        Change("tokens/s a chip", "", before.tokens_per_s_per_chip, after.tokens_per_s_per_chip),
    ]


def format_diff(before: Plan, after: Plan) -> str:
    """The figures that differ, with the difference; says so where none does."""
    rows = [
        [change.name, _value(change.before, change.unit), _value(change.after, change.unit),
         _relative(change)]
        for change in changes(before, after)
        if change.before != change.after
    ]  # fmt: skip
    heading = f"{_title(before)}  ->  {_title(after)}"
    if not rows:
        return f"{heading}\n  the same in every figure"
    settings = [
        f"  {name}: {before.settings.get(name)} -> {after.settings.get(name)}"
        for name in {**before.settings, **after.settings}
        if before.settings.get(name) != after.settings.get(name)
    ]
    return "\n".join([heading, *settings, table(rows, "lrrr")])


def diff_to_json(before: Plan, after: Plan) -> dict[str, Any]:
    """All figures, changed or not: `{name: {before, after, unit}}`."""
    return {
        change.name: {"before": change.before, "after": change.after, "unit": change.unit}
        for change in changes(before, after)
    }


def _memory(before: Plan, after: Plan) -> Iterator[Change]:
    old, new = memory_categories(before), memory_categories(after)
    for name in {**old, **new}:
        yield Change(name, "GiB", old.get(name, 0), new.get(name, 0))
    yield Change("peak", "GiB", before.peak_bytes, after.peak_bytes)
    yield Change("host memory", "GiB", before.host_bytes, after.host_bytes)


def _collectives(before: Plan, after: Plan) -> Iterator[Change]:
    """Bytes by kind and axis, and how many of them aren't overlapped."""
    for exposed_only in (False, True):
        sums = [_bytes_by_kind(plan, exposed_only) for plan in (before, after)]
        for name in sorted({**sums[0], **sums[1]}):
            label = f"{name}, not overlapped" if exposed_only else name
            yield Change(label, "B", sums[0].get(name, 0), sums[1].get(name, 0))


def _bytes_by_kind(plan: Plan, exposed_only: bool) -> dict[str, int]:
    found: dict[str, int] = {}
    for use in plan.collectives:
        if not (exposed_only and use.overlapped):
            name = f"{use.kind} over {use.axis}"
            found[name] = found.get(name, 0) + use.bytes
    return found


def _counts(what: str, before: dict[str, int], after: dict[str, int]) -> Iterator[Change]:
    for name in sorted({**before, **after}):
        yield Change(f"{what} {name}", "", before.get(name, 0), after.get(name, 0))


def _title(plan: Plan) -> str:
    return f"{plan.run} ({plan.num_slices} x {plan.slice_name})"


def _value(value: float, unit: str) -> str:
    if unit == "GiB":
        return gib(value)
    if unit == "s":
        return seconds(value)
    return scaled(value, unit) if unit else f"{value:,.0f}"


def _relative(change: Change) -> str:
    if change.before == 0:
        return "new"
    return f"{change.after / change.before - 1:+.1%}"
