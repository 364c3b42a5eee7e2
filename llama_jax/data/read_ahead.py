"""Reading ahead with Grain: in a thread, or in worker processes that never outlive the run."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait
from typing import TypeVar

import grain
from absl import flags

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
    # Ctrl-C reaches the whole process group; the run alone answers it, and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for ever for someone to take its batch."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
