"""Compile a run for TPUs that aren't there: what fits, what bounds its speed, what it costs.

Needs no TPU: only the TPU compiler, of `pip install 'llama-jax[tpu]'`.

Examples:
  llama-jax plan pretrain/llama3.1-8b-v5e-16 --price-per-chip-hour 1.2
  llama-jax plan my-run.toml --topology v5p:2x2x2 --set execution.remat=full --json
  llama-jax plan my-run.toml --topology v6e-8 --search --out chosen.toml
  llama-jax plan --diff before.json after.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.config.files import load_run_config
from llama_jax.config.hardware import Slice, find_slice
from llama_jax.config.loading import ConfigError
from llama_jax.config.run import RunConfig

if TYPE_CHECKING:
    from llama_jax.planning.making import Planner
    from llama_jax.planning.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `llama-jax plan`."""
    parser.add_argument("run", nargs="?", help="a run's TOML file, or the name of a shipped one")
    parser.add_argument(
        "--topology",
        metavar="SLICE",
        help="such as v5e:4x4, v5e-16, v5p-8 or tpu7x-128; default, the run's `hardware.slice`",
    )
    parser.add_argument(
        "--slices", type=_positive, help="joined by the data centre's network; default 1"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field, such as --set execution.remat=full; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on stdout")
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, remat, microbatches and context sharding; rank them",
    )
    parser.add_argument(
        "--compile-best", type=_positive, default=4, metavar="N", help="of --search; default 4"
    )
    parser.add_argument("--out", metavar="FILE", help="where --search writes the chosen run")
    parser.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="compare two plans (JSON) or runs (TOML)"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="draw memory and time into a .png, .svg or .pdf file"
    )
    costs = parser.add_argument_group("costs", "nothing is assumed of prices")
    costs.add_argument("--price-per-chip-hour", type=_not_negative, metavar="MONEY")
    costs.add_argument(
        "--storage-gb-per-s", type=_above_0, metavar="GB", help="what a VM writes; default 1"
    )
    parser.add_argument(
        "--no-cache", action="store_true", help="compile even what has been planned before"
    )


def run(args: argparse.Namespace) -> int:
    """Plan; 0 when it fits, 1 when it doesn't."""
    _refuse_what_has_no_effect(args)
    if args.diff:
        return _diff(args)
    if args.run is None:
        raise ConfigError("give a run's TOML file, or the name of a shipped one", key="run")
    # Wrong arguments are told before JAX is loaded.
    config = load_run_config(args.run, args.set)
    slice_, slices = _target(config, args.topology, args.slices)
    planner = _planner(args, slice_, slices)
    from llama_jax.quantization.dot import without_units

    lost = without_units(config.execution.matmul_precision, slice_.chip)
    if lost:
        _say_on_stderr(lost)
    if args.search:
        return _search(args, config, planner)
    from llama_jax.planning.compiling import OutOfMemoryError

    name = Path(args.run).stem if args.run.endswith(".toml") else args.run
    try:
        plan = planner.plan(config, name)
    except OutOfMemoryError as error:
        return _does_not_fit(args, config, planner, name, error)
    _show(args, plan, config, slice_)
    return 0


def _refuse_what_has_no_effect(args: argparse.Namespace) -> None:
    mode = "--diff" if args.diff else "--search" if args.search else None
    if args.out and mode != "--search":
        raise ConfigError("only --search writes a run", key="--out")
    if args.diff and args.run is not None:
        raise ConfigError("--diff names both of its plans itself", key="run")
    of_one_plan = {
        "--picture": args.picture,
        "--price-per-chip-hour": args.price_per_chip_hour,
        "--storage-gb-per-s": args.storage_gb_per_s,
    }
    for name, value in of_one_plan.items():
        if mode and value is not None:
            raise ConfigError(f"has no effect with {mode}", key=name)


def _target(config: RunConfig, topology: str | None, slices: int | None) -> tuple[Slice, int]:
    """The slice of `--topology`, else the one that the run is meant for."""
    if topology is not None:
        return find_slice(topology), slices or 1
    if config.hardware is None:
        raise ConfigError("give one, such as --topology v5e-16", key="--topology")
    return find_slice(config.hardware.slice), slices or config.hardware.slices


def _planner(args: argparse.Namespace, slice_: Slice, slices: int) -> "Planner":
    from llama_jax.planning.cache import default_folder
    from llama_jax.planning.compiling import prepare_compiler
    from llama_jax.planning.making import Planner

    prepare_compiler()
    return Planner(slice_, slices, None if args.no_cache else default_folder())


def _show(args: argparse.Namespace, plan: "Plan", config: RunConfig, slice_: Slice) -> None:
    from llama_jax.planning.costs import ASSUMED_STORAGE_BYTES_PER_S, costs_to_json, run_costs
    from llama_jax.planning.plan import to_json
    from llama_jax.planning.report import format_plan

    rate = args.storage_gb_per_s
    costs = run_costs(
        plan,
        config,
        slice_.chip,
        num_hosts=slice_.num_hosts * plan.num_slices,
        price_per_chip_hour=args.price_per_chip_hour,
        storage_bytes_per_s=ASSUMED_STORAGE_BYTES_PER_S if rate is None else rate * 1e9,
    )
    if args.picture:
        from llama_jax.planning.picture import draw_plan

        draw_plan(plan, Path(args.picture))
    if args.json:
        print(json.dumps({**to_json(plan), "costs": costs_to_json(costs)}))
    else:
        print(format_plan(plan, costs))


def _does_not_fit(
    args: argparse.Namespace, config: RunConfig, planner: "Planner", name: str, error: Any
) -> int:
    from llama_jax.planning.advice import advice_to_json, advise, format_advice

    say = _say_on_stderr
    advice = advise(planner, config, name, error, say)
    print(json.dumps(advice_to_json(advice)) if args.json else format_advice(advice))
    return 1


def _search(args: argparse.Namespace, config: RunConfig, planner: "Planner") -> int:
    from llama_jax.planning.search import (
        format_ranking,
        ranking_to_json,
        search,
        write_chosen,
    )

    ranking = search(planner, config, args.compile_best, _say_on_stderr)
    print(json.dumps(ranking_to_json(ranking)) if args.json else format_ranking(ranking))
    if ranking.best is None:
        return 1
    if args.out:
        write_chosen(ranking, Path(args.out), planner)
        _say_on_stderr(f"wrote {args.out}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from llama_jax.planning.diff import diff_to_json, format_diff

    plans = [_plan_of(args, name) for name in args.diff]
    if args.json:
        print(json.dumps(diff_to_json(*plans)))
    else:
        print(format_diff(*plans))
    return 0


def _plan_of(args: argparse.Namespace, name: str) -> "Plan":
    """A plan from the JSON that `--json` printed, or of a run, planned now."""
    from llama_jax.planning.plan import read_plan

    if name.endswith(".json"):
        return read_plan(Path(name))
    config = load_run_config(name, args.set)
    planner = _planner(args, *_target(config, args.topology, args.slices))
    return planner.plan(config, Path(name).stem if name.endswith(".toml") else name)


def _say_on_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value
