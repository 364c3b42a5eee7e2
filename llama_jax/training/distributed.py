"""Joining several processes into one run, from flags or from what the machine says.

On TPU VMs, Slurm and the like JAX finds the coordinator and the ranks by itself. Elsewhere
three flags say it. Every process runs the same command on the same shared run directory.
"""

import dataclasses

import jax

from llama_jax.config.loading import ConfigError
from llama_jax.training.peers import dead_after_s, watch


@dataclasses.dataclass(frozen=True)
class Processes:
    """The flags: all three, or none."""

    coordinator: str | None = None  # host:port of process 0
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        given = [value is not None for value in dataclasses.astuple(self)]
        if any(given) and not all(given):
            raise ConfigError(
                "--coordinator, --num-processes and --process-id go together; "
                "leave all out on a TPU VM"
            )
        count, number = self.num_processes, self.process_id
        if count is not None and number is not None and not 0 <= number < count:
            raise ConfigError(f"{number} is not between 0 and {count - 1}", key="--process-id")


def join(processes: Processes, platform: str | None) -> None:
    """Start `jax.distributed` if there is more than this process; before any device is used.

    Args:
      processes: the flags.
      platform: what `--platform` says. With `cpu` and no flags this process stays alone, so that
        a quick check on one host of a slice doesn't wait for the others.
    """
    if jax.distributed.is_initialized():
        return
    if processes.coordinator is not None:
        # Only the CPU backend reads this; gloo is the one in every wheel.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            processes.coordinator,
            processes.num_processes,
            processes.process_id,
            heartbeat_timeout_seconds=dead_after_s(),
        )
    elif platform != "cpu":
        _join_detected()
    watch()


def _join_detected() -> None:
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=dead_after_s())
    except ValueError as error:
        # No cluster that JAX knows: the usual case, one process on one machine. Anything else is
        # a cluster that was found and is set up wrongly: training alone would hide it.
        if "coordinator_address should be defined" not in str(error):
            raise


def wait_for_all(what: str) -> None:
    """Block until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
