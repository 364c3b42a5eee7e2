"""Which fields of a run's config may change between a checkpoint and its continuation."""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.config.loading import ConfigError, to_table
from llama_jax.config.run import RunConfig

# Fields that name a checkpoint.
CHECKPOINT_KEYS = ("init.path", "init.adapter", "objective.path")
# Patterns of dotted keys; the first that matches decides. What matches none may not change.
RULES: tuple[tuple[str, bool], ...] = (
    # Where and how it is computed: the same numbers up to rounding.
    ("mesh.*", True),
    ("execution.param_dtype", False),  # the stored state's own dtype
    ("execution.*", True),
    ("compiler.*", True),
    ("training.microbatches", True),
    ("optimizer.offload_moments", True),
    ("hardware.*", True),
    # Who is told, when it is saved or looked at.
    ("metrics.*", True),
    ("checkpoint.*", True),
    ("training.eval_every", True),
    ("training.eval_batches", True),
    ("training.sample_*", True),
    ("training.max_skipped_steps", True),
    ("data.held_out*", True),
    ("data.workers", True),
    ("data.prefetch", True),
    # A moved folder or file; what is in it is checked by the data's own fingerprint and by the
    # names, sizes and hashes of the files that it was built from.
    ("data.sources.*.shards", True),
    ("data.sources.*.text.path", True),
    ("data.sources.*.conversations.path", True),
    ("data.sources.*.preferences.path", True),
    ("tokenizer.path", True),
    # What is read at every start is checked by its fingerprint, see `origins`; the rest of these
    # only said where step 0 came from.
    *((key, True) for key in CHECKPOINT_KEYS),
    # Longer or shorter: the schedule is drawn anew over the new length, and the run says so.
    ("training.steps", True),
)


def may_change(key: str) -> bool:
    """Whether a dotted key may differ from what the checkpoint was made with."""
    return next((allowed for pattern, allowed in RULES if fnmatch.fnmatch(key, pattern)), False)


def changes(before: RunConfig, after: RunConfig) -> list[tuple[str, Any, Any]]:
    """Every leaf that differs: dotted key, old value, new value; None stands for absent."""
    old, new = dict(_leaves(to_table(before))), dict(_leaves(to_table(after)))
    keys = sorted(old.keys() | new.keys())
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def check_compatible(before: RunConfig, after: RunConfig, source: str) -> list[str]:
    """Notices of the fields that changed and may.

    Raises:
      ConfigError: naming every field that changed and may not.
    """
    found = changes(before, after)
    refused = [change for change in found if not may_change(change[0])]
    if refused:
        raise ConfigError(
            f"{_list(refused)} contradicts the checkpoint of this run; restore the old value, or "
            "start another run with another --run-dir",
            source=source,
        )
    return [f"changed since the checkpoint: {_list([change])}" for change in found]


def _list(found: list[tuple[str, Any, Any]]) -> str:
    return ", ".join(f"{key} ({_shown(old)} -> {_shown(new)})" for key, old, new in found)


def _shown(value: Any) -> str:
    return "unset" if value is None else repr(value)


def _leaves(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(table, Mapping):
        pairs = table.items()
    elif isinstance(table, list) and table and isinstance(table[0], Mapping):
        pairs = enumerate(table)
    else:
        yield prefix, table
        return
    for key, value in pairs:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
