"""What this machine has: devices, versions, memory; and what is wrong with it.

Exits 0 when nothing is wrong, 1 when something is.

Example:
  llama-jax doctor
  llama-jax doctor --json
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `llama-jax doctor`."""
    parser.add_argument("--json", action="store_true", help="print facts and findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print facts and findings; 1 when there are findings."""
    from rich.console import Console
    from rich.table import Table

    from llama_jax.metrics.progress import format_bytes
    from llama_jax.training.diagnosis import facts, findings

    known, wrong = facts(), findings()
    if args.json:
        print(json.dumps({**known, "findings": wrong}, indent=2))
        return 1 if wrong else 0
    table = Table(show_header=False)
    for device in known["devices"]:
        memory = device["memory_bytes"]
        size = "memory not told" if memory is None else format_bytes(memory)
        table.add_row(f"device {device['id']}", f"{device['platform']}, {device['kind']}, {size}")
    host = known["host"]
    table.add_row("CPUs", str(host["cpus"]))
    table.add_row("memory", format_bytes(host["memory_bytes"]))
    table.add_row("free disk here", format_bytes(host["free_disk_bytes"]))
    for group in ("versions", "settings"):
        for name, value in known[group].items():
            table.add_row(name, str(value) or "not set")
    console = Console()
    console.print(table)
    for finding in wrong:
        console.print(f"wrong: {finding}", highlight=False, soft_wrap=True, markup=False)
    if not wrong:
        console.print("nothing is wrong")
    return 1 if wrong else 0
