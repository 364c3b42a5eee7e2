"""Reading ahead with Grain: in a thread, or in worker processes that never outlive the run."""

from typing import TypeVar

import grain
from absl import flags

from llama_jax.data.workers import follow_parent

Element = TypeVar("Element")


def read_ahead(
    elements: "grain.MapDataset[Element]", *, workers: int, count: int
) -> "grain.DatasetIterator[Element]":
    """The elements in order, about `count` of them ready; `workers` 0 reads in a thread."""
    # One thread: packing holds the interpreter's lock, more threads would only take turns.
    if not workers:
        thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=count)
        return iter(elements.to_iter_dataset(thread))
    # Grain asks absl for its flags, which nobody parses in a program that isn't an absl app.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    in_order = elements.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    processes = grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=-(-count // workers)
    )
    return iter(in_order.mp_prefetch(processes, worker_init_fn=_start_worker))


def _start_worker(index: int, count: int) -> None:
    del index, count
    follow_parent()
