"""Train a model as a run's TOML file says, from its newest checkpoint if it has one.

Example:
  llama-jax train quickstart
  llama-jax train configs/runs/debug/tiny.toml --run-dir /tmp/tiny --set training.steps=20
"""

import argparse
import json
import sys

from llama_jax.config.files import load_run_config
from llama_jax.training.compiler_flags import set_compiler_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `llama-jax train`."""
    parser.add_argument("run", help="a run's TOML file, or the name of a shipped one")
    parser.add_argument("--run-dir", help="folder of the run; default runs/<name>")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field, such as --set training.steps=20; repeatable",
    )
    parser.add_argument(
        "--platform", choices=("cpu", "gpu", "tpu"), help="use this one, or fail if it isn't there"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on stdout")
    parser.add_argument(
        "--no-compiler-flags",
        action="store_true",
        help="on a TPU, leave out the flags of the chip's table and of the run's [compiler]",
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace these steps, such as 10:15, into the run's profile/ for XProf and TensorBoard",
    )
    processes = parser.add_argument_group(
        "several processes", "not needed on TPU VMs, where they find each other"
    )
    processes.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    processes.add_argument("--num-processes", type=int, metavar="N")
    processes.add_argument("--process-id", type=int, metavar="I")


def run(args: argparse.Namespace) -> int:
    """Train; 0 when done, 130 or 143 when a signal stopped it after saving."""
    # A wrong config is told before JAX is loaded, and libtpu reads its flags when it is.
    config = load_run_config(args.run, args.set)
    flags_line = "" if args.no_compiler_flags else set_compiler_flags(config, args.platform)

    import jax
    from rich.console import Console

    from llama_jax.cli.train_table import show_outcome
    from llama_jax.config.run_files import default_run_dir
    from llama_jax.training.distributed import Processes, join
    from llama_jax.training.environment import (
        describe_devices,
        enable_compilation_cache,
        select_platform,
    )
    from llama_jax.training.needed_runs import checkpoints_of, train_needed
    from llama_jax.training.profiling import ProfileRange
    from llama_jax.training.run import train

    profile = None if args.profile is None else ProfileRange.parse(args.profile)
    processes = Processes(args.coordinator, args.num_processes, args.process_id)
    # With --json stdout holds the figures alone.
    console = Console(file=sys.stderr if args.json else sys.stdout)
    join(processes, args.platform)
    select_platform(args.platform)
    enable_compilation_cache()
    if jax.process_index() == 0:
        console.print(describe_devices(), highlight=False, soft_wrap=True)
        if flags_line:
            console.print(flags_line, highlight=False, soft_wrap=True, markup=False)
    run_dir = args.run_dir or default_run_dir(args.run)
    outcome = train_needed(checkpoints_of(config), console)
    if outcome is None:
        outcome = train(config, run_dir, console, profile=profile)
    if jax.process_index() == 0:
        if args.json:
            print(json.dumps({"run_dir": str(outcome.run_dir), "step": outcome.step,
                              "figures": outcome.figures}))  # fmt: skip
        show_outcome(outcome, console)
    return outcome.exit_code
