"""`plan --search`: the fastest way to run the same training on given slices.

Nothing that changes what is learnt is touched: the global batch, the model and the optimizer stay.
Candidates are priced by the analytic model; those that can't fit are dropped, the best of the rest
are compiled, and only what has been compiled is recommended.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama_jax.config.hardware import Slice
from llama_jax.config.loading import ConfigError, to_table, to_toml
from llama_jax.config.run import HardwareConfig, RunConfig
from llama_jax.planning.analytic import memory_model, sizes_of, time_model
from llama_jax.planning.compiling import PlanError
from llama_jax.planning.making import Planner
from llama_jax.planning.plan import Plan, to_json
from llama_jax.planning.report import gib, seconds, table
from llama_jax.planning.variants import REMAT_PRESETS, Changes, changed, describe, powers_of_two

Say = Callable[[str], None]
# The analytic peak is within a tenth of the compiler's: what is over by more can't fit.
SURELY_TOO_LARGE = 1.1
# A ring over more shards has too little work in each to hide a step of it.
MOST_CONTEXT = 64
LEAST_TOKENS_OF_A_SHARD = 1024


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run it, by the analytic model; `peak_bytes` are a device's."""

    changes: Changes
    config: RunConfig
    peak_bytes: float
    estimate_s: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A candidate after the compiler has seen it: its plan, or why there is none."""

    candidate: Candidate
    plan: Plan | None
    refusal: str = ""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Fastest first; what didn't compile last.

    Attributes:
      tried: how many candidates were priced; `fitting` of them seemed to fit.
    """

    compiled: tuple[Compiled, ...]
    tried: int
    fitting: int

    @property
    def best(self) -> Compiled | None:
        """The fastest that fits, None where nothing does."""
        first = self.compiled[0] if self.compiled else None
        return first if first is not None and first.plan is not None else None


def search(planner: Planner, config: RunConfig, compile_best: int, say: Say) -> Ranking:
    """Price all candidates, compile the most promising until `compile_best` fit.

    At most twice as many are compiled.

    Raises:
      ConfigError: no mesh divides the run's batch over these devices.
    """
    priced = list(candidates(config, planner))
    if not priced:
        raise ConfigError(
            f"no mesh of {planner.num_devices} devices divides {config.data.batch_size} sequences",
            key="data.batch_size",
        )
    limit = planner.slice_.chip.device_usable_hbm_bytes * SURELY_TOO_LARGE
    fitting = [candidate for candidate in priced if candidate.peak_bytes <= limit]
    say(f"{len(priced)} candidates, {len(fitting)} may fit; compiling the best {compile_best}")
    done: list[Compiled] = []
    for candidate in promising(fitting)[: 2 * compile_best]:
        if sum(one.plan is not None for one in done) == compile_best:
            break
        done.append(_compile(planner, candidate))
        say(f"  {describe(candidate.changes)}: {_outcome(done[-1])}")
    done.sort(key=lambda one: (one.plan is None, one.plan.pessimistic_s if one.plan else 0.0))
    return Ranking(tuple(done), len(priced), len(fitting))


def candidates(config: RunConfig, planner: Planner) -> Iterator[Candidate]:
    """Every combination of mesh, microbatches and remat preset that divides batch and model."""
    for mesh in meshes(config, planner.num_devices, planner.num_slices):
        rows = config.data.batch_size // (mesh["mesh.data"] * mesh["mesh.fsdp"])
        for microbatches in powers_of_two(rows):
            if rows % microbatches:
                continue
            for remat in REMAT_PRESETS:
                changes = {
                    **mesh,
                    "training.microbatches": microbatches,
                    "execution.remat": remat,
                    "execution.remat_save": [],
                    "execution.remat_offload": [],
                }
                yield price(config, changes, planner.slice_, planner.num_slices)


def meshes(config: RunConfig, num_devices: int, num_slices: int) -> Iterator[Changes]:
    """Meshes whose axes divide model, length and batch; only `data` crosses slices."""
    model, data = config.model, config.data
    inside = num_devices // num_slices
    for tensor in powers_of_two(min(model.num_kv_heads, inside)):
        for context in powers_of_two(min(MOST_CONTEXT, inside // tensor)):
            # Zigzag order cuts the length in two chunks a shard.
            short = context > 1 and data.seq_len // context < LEAST_TOKENS_OF_A_SHARD
            if short or data.seq_len % (2 * context) or inside % (tensor * context):
                continue
            left = inside // (tensor * context)
            for replicas in powers_of_two(left):
                fsdp = left // replicas
                shards = num_slices * replicas * fsdp
                if left % replicas or data.batch_size % shards:
                    continue
                if _divides(config, fsdp, tensor):
                    yield {
                        "mesh.data": num_slices * replicas,
                        "mesh.fsdp": fsdp,
                        "mesh.context": context,
                        "mesh.tensor": tensor,
                    }


def price(config: RunConfig, changes: Changes, slice_: Slice, num_slices: int) -> Candidate:
    """A candidate by the analytic model."""
    variant = changed(config, changes)
    sizes = sizes_of(variant, slice_.num_devices * num_slices, num_slices)
    memory = memory_model(variant, sizes)
    time = time_model(variant, sizes, slice_)
    return Candidate(changes, variant, memory.peak_bytes, time.estimate)


def promising(found: list[Candidate]) -> list[Candidate]:
    """Fastest first, and of each mesh and remat preset only the best number of microbatches."""
    best: dict[tuple[Any, ...], Candidate] = {}
    for candidate in sorted(found, key=lambda one: one.estimate_s):
        kind = tuple(v for k, v in candidate.changes.items() if k != "training.microbatches")
        best.setdefault(tuple(map(str, kind)), candidate)
    return list(best.values())


def format_ranking(ranking: Ranking) -> str:
    """A table, and the command that plans the best."""
    rows = [["", "mesh", "microbatches", "remat", "peak", "estimate", "all told", "MFU"]]
    for number, one in enumerate(ranking.compiled, start=1):
        changes = one.candidate.changes
        axes = ("data", "fsdp", "context", "tensor")
        mesh = " x ".join(f"{axis} {changes[f'mesh.{axis}']}" for axis in axes)
        settings = [mesh, str(changes["training.microbatches"]), changes["execution.remat"]]
        rows.append([str(number), *settings, *_figures(one)])
    heading = (
        f"{ranking.tried} candidates, {ranking.fitting} may fit by the analytic model; "
        f"compiled {len(ranking.compiled)}, fastest first (all told: with collectives that aren't "
        "overlapped)"
    )
    lines = [heading, table(rows, "rlrlrrrl")]
    if ranking.best is None:
        lines.append("none of them fits; give more chips, or see `plan` without --search")
    else:
        lines.append(f"best: {describe(_short(ranking.best.candidate.changes))}")
    return "\n".join(lines)


def ranking_to_json(ranking: Ranking) -> dict[str, Any]:
    """For `--search --json`."""
    return {
        "tried": ranking.tried,
        "fitting": ranking.fitting,
        "ranking": [
            {
                "changes": one.candidate.changes,
                "analytic_peak_bytes": one.candidate.peak_bytes,
                "analytic_s": one.candidate.estimate_s,
                "plan": None if one.plan is None else to_json(one.plan),
                "refusal": one.refusal,
            }
            for one in ranking.compiled
        ],
    }


def write_chosen(ranking: Ranking, path: Path, planner: Planner) -> None:
    """The best candidate's whole run as TOML, with the slices that it is for."""
    assert ranking.best is not None
    hardware = HardwareConfig(planner.slice_.name, planner.num_slices)
    chosen = dataclasses.replace(ranking.best.candidate.config, hardware=hardware)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"# Chosen by `llama-jax plan --search` for {planner.num_slices} x "
        f"{planner.slice_.name}.\n\n{to_toml(to_table(chosen))}",
        encoding="utf-8",
    )


def _compile(planner: Planner, candidate: Candidate) -> Compiled:
    try:
        return Compiled(candidate, planner.plan(candidate.config, "search"))
    except (PlanError, ConfigError) as error:
        return Compiled(candidate, None, str(error))


def _outcome(one: Compiled) -> str:
    if one.plan is None:
        return one.refusal
    return f"{gib(one.plan.peak_bytes)}, estimate {seconds(one.plan.time_s['estimate'])}"


def _figures(one: Compiled) -> list[str]:
    if one.plan is None:
        return ["-", "-", "-", one.refusal]
    plan = one.plan
    times = [seconds(plan.time_s["estimate"]), seconds(plan.pessimistic_s)]
    return [gib(plan.peak_bytes), *times, f"{plan.mfu:.1%}"]


def _short(changes: Changes) -> Changes:
    return {key: value for key, value in changes.items() if value != []}


def _divides(config: RunConfig, fsdp: int, tensor: int) -> bool:
    model = config.model
    split = (model.num_heads, model.mlp_dim, model.vocab_size)
    return model.embed_dim % fsdp == 0 and all(size % tensor == 0 for size in split)
