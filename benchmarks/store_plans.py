"""Compile the shipped runs for their slices; write their plans and the table in docs/plans.md.

  python benchmarks/store_plans.py                      all that have no stored plan yet
  python benchmarks/store_plans.py --anew               all
  python benchmarks/store_plans.py pretrain/llama3.1-8b-v5e-16   these
  python benchmarks/store_plans.py --table-only         the table, from what is stored

Compiling takes half a minute to a few minutes a run on two cores.
"""

import argparse
import sys
from pathlib import Path

from llama_jax.config.files import load_run_config
from llama_jax.config.hardware import find_slice
from llama_jax.planning.cache import default_folder
from llama_jax.planning.compiling import PlanError, prepare_compiler
from llama_jax.planning.making import Planner
from llama_jax.planning.stored import plans_page, read_plans, shipped_runs, write_plan

ROOT = Path(__file__).parents[1]
PLANS = ROOT / "tests" / "planning" / "plans"
PAGE = ROOT / "docs" / "plans.md"


def main() -> int:
    """The number of runs that have no plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="names of shipped runs")
    parser.add_argument("--anew", action="store_true", help="also those that are stored")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    names = args.runs or [
        name for name in shipped_runs() if args.anew or not (PLANS / f"{name}.json").exists()
    ]
    failed = 0 if args.table_only else _compile(names)
    PAGE.write_text(plans_page(read_plans(PLANS).values()), encoding="utf-8")
    return failed


def _compile(names: list[str]) -> int:
    prepare_compiler()
    failed = 0
    for name in names:
        config = load_run_config(name)
        if config.hardware is None:
            print(f"{name}: says no hardware", file=sys.stderr)
            failed += 1
            continue
        slice_ = find_slice(config.hardware.slice)
        try:
            plan = Planner(slice_, config.hardware.slices, default_folder()).plan(config, name)
        except PlanError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed += 1
            continue
        write_plan(plan, PLANS)
        print(f"{name}: {plan.peak_bytes / 2**30:.2f} GiB, compiled in {plan.compile_s:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main())
