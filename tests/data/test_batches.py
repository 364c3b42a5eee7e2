import collections
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.config.loading import ConfigError
from llama_jax.config.run import DataConfig, MeshConfig, SourceConfig
from llama_jax.data.batches import (
    fingerprint,
    held_out_batches,
    make_batches,
    resume_step,
)
from llama_jax.data.device import host_rows, to_device
from llama_jax.data.documents import DataError, InMemoryDocuments
from llama_jax.data.rows import FIELDS
from llama_jax.sharding.mesh import make_mesh

pytestmark = pytest.mark.short

SEQ_LEN = 16


def source(name, weight=1.0):
    return SourceConfig(name=name, weight=weight, shards="unused")


def config(**changes):
    defaults = {"seq_len": SEQ_LEN, "batch_size": 8, "sources": (source("numbered"),)}
    return DataConfig(**{**defaults, **changes})


def numbered(count, length=SEQ_LEN):
    """Documents that hold nothing but their own number."""
    return InMemoryDocuments([[number + 1] * length for number in range(count)])


def varied(seed, count=200):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(2, 50, count)
    return InMemoryDocuments([generator.integers(1, 1000, size).tolist() for size in sizes])


def hosts_rows(hosts):
    """The rows of each of so many hosts."""
    return np.split(np.arange(8), hosts)


def read(data, documents, hosts, *, start, stop):
    """The global batches of these steps, put together from what each host reads."""
    shares = []
    for rows in hosts_rows(hosts):
        batches = make_batches(data, documents, rows=rows, seed=7, start_step=start)
        shares.append([next(batches) for _ in range(stop - start)])
        assert batches.position["next_step"] == stop
        batches.close()
    return [
        {name: np.concatenate([batch[name] for batch in step]) for name in FIELDS}
        for step in zip(*shares, strict=True)
    ]


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a[name], b[name])
        for a, b in zip(left, right, strict=True)
        for name in FIELDS
    )


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_global_batches_are_the_same_for_any_number_of_hosts(packing):
    data = config(packing=packing, sources=(source("a", 0.7), source("b", 0.3)))
    documents = [varied(0), varied(1, 30)]
    alone = read(data, documents, 1, start=0, stop=12)
    for hosts in (2, 4, 8):
        assert same(read(data, documents, hosts, start=0, stop=12), alone)
    assert not same(alone[:1], alone[1:2])


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_after_a_resume_on_two_hosts_every_document_has_come_exactly_once(packing):
    # B19: 103 numbered documents, 4 hosts, global batch 8, resume on 2 after 5 steps.
    data, documents = config(packing=packing), [numbered(103)]
    steps = read(data, documents, 4, start=0, stop=5) + read(data, documents, 2, start=5, stop=26)
    seen = np.concatenate([batch["tokens"][:, 0] for batch in steps])
    assert len(seen) == 208  # two epochs of 103, and two rows of the third
    assert sorted(seen[:103]) == sorted(seen[103:206]) == list(range(1, 104))
    assert same(steps, read(data, documents, 1, start=0, stop=26))


def test_hosts_read_disjoint_rows():
    documents = [numbered(103)]
    seen = []
    for rows in hosts_rows(4):
        batches = make_batches(config(), documents, rows=rows, seed=0, start_step=0)
        seen += [set(next(batches)["tokens"][:, 0].tolist()) for _ in range(1)]
        batches.close()
    assert len(set.union(*seen)) == sum(len(part) for part in seen) == 8


def test_a_mixture_has_the_stated_share_of_tokens():
    data = config(sources=(source("a", 3), source("b", 1)))
    documents = [numbered(50, length=11), InMemoryDocuments([[1000] * 70] * 5)]
    batches = read(data, documents, 1, start=0, stop=100)
    tokens = np.concatenate([batch["tokens"].ravel() for batch in batches])
    assert np.mean(tokens == 1000) == 0.25


def test_another_seed_gives_other_batches_of_the_same_documents():
    documents = [numbered(16)]
    orders = []
    for seed in (0, 1):
        batches = make_batches(config(), documents, rows=range(8), seed=seed, start_step=0)
        orders.append([*next(batches)["tokens"][:, 0], *next(batches)["tokens"][:, 0]])
        batches.close()
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1, 17))


def test_a_position_of_other_data_is_refused():
    data, documents = config(), [varied(0)]
    batches = make_batches(data, documents, rows=range(8), seed=7, start_step=0)
    for _ in range(3):
        next(batches)
    position = batches.position
    batches.close()
    assert resume_step(position, data, documents, seed=7) == 3
    ahead = dataclasses.replace(data, prefetch=9, workers=3)
    assert resume_step(position, ahead, documents, seed=7) == 3
    changes = [
        (data, documents, 8),
        (data, [varied(1)], 7),
        (dataclasses.replace(data, batch_size=16), documents, 7),
        (dataclasses.replace(data, seq_len=8), documents, 7),
        (dataclasses.replace(data, packing="best_fit"), documents, 7),
        (dataclasses.replace(data, sources=(source("renamed"),)), documents, 7),
    ]
    for changed, others, seed in changes:
        with pytest.raises(DataError, match="not what the checkpoint was trained on"):
            resume_step(position, changed, others, seed=seed)
    two = [varied(0), varied(1)]
    even, uneven = (config(sources=(source("a"), source("b", w))) for w in (1.0, 2.0))
    assert fingerprint(even, two, seed=0) != fingerprint(uneven, two, seed=0)


def test_an_empty_source_is_named():
    data = config(sources=(source("full"), source("hollow")))
    with pytest.raises(DataError, match=r"'hollow'.*not one token"):
        make_batches(data, [varied(0), InMemoryDocuments([[]])], rows=[0], seed=0, start_step=0)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    data, documents = config(workers=2), [varied(0)]
    alone = read(dataclasses.replace(data, workers=0), documents, 1, start=3, stop=10)
    assert same(read(data, documents, 1, start=3, stop=10), alone)


class Damaged(InMemoryDocuments):
    def read(self, numbers):
        raise DataError("shard-00003: document 7 is damaged")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_record_is_raised_where_the_batch_is_taken(workers):
    batches = make_batches(
        config(workers=workers), [Damaged([[1, 2]])], rows=range(8), seed=0, start_step=0
    )
    with pytest.raises(DataError, match="shard-00003: document 7 is damaged"):
        next(batches)
    batches.close()


KILLED = """
import multiprocessing, os, signal
from llama_jax.config.run import DataConfig, SourceConfig
from llama_jax.data.batches import make_batches
from llama_jax.data.documents import InMemoryDocuments

if __name__ == "__main__":
    source = SourceConfig(name="a", shards="unused")
    config = DataConfig(seq_len=4, batch_size=2, sources=(source,), workers=1)
    documents = [InMemoryDocuments([[1, 2, 3]])]
    batches = make_batches(config, documents, rows=[0, 1], seed=0, start_step=0)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks at processes in /proc")
def test_workers_end_with_a_killed_run(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(llama_jax.__file__).parents[1])},
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    children = [Path("/proc", number) for number in done.stdout.split()]
    assert children
    deadline = time.monotonic() + 20
    while any(map(_runs, children)):
        assert time.monotonic() < deadline, "a worker outlives its run"
        time.sleep(0.1)


def _runs(process):
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


def test_held_out_documents_come_once_in_batches_of_one_shape():
    # B22: 37 rows don't fill 5 batches of 8.
    data = config(held_out=(source("a"), source("b")))
    documents = [numbered(20), InMemoryDocuments([[500] * 11] * 24, text_bytes=[9] * 24)]
    taken = [
        list(held_out_batches(data, documents, rows=rows, count=None)) for rows in hosts_rows(2)
    ]
    assert len(taken[0]) == len(taken[1]) == 5
    assert {array.shape for batch, _ in taken[0] for array in batch.values()} == {(4, SEQ_LEN)}
    batches = [
        {name: np.concatenate([half[0][name] for half in halves]) for name in FIELDS}
        for halves in zip(*taken, strict=True)
    ]
    counts = collections.Counter(np.concatenate([b["tokens"].ravel() for b in batches]).tolist())
    padding = 5 * 8 * SEQ_LEN - 20 * SEQ_LEN - 24 * 11
    assert counts == {**dict.fromkeys(range(1, 21), SEQ_LEN), 500: 24 * 11, 0: padding}
    first_column = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert first_column[:20].tolist() == list(range(1, 21))
    # Segment 0 and no target in the padding; every token but each document's first is a target.
    assert sum(np.sum(b["segment_ids"] == 0) for b in batches) == padding
    assert sum(b["loss_mask"].sum() for b in batches) == 20 * (SEQ_LEN - 1) + 24 * 10
    # Both hosts count the bytes of the global batch.
    assert [count for _, count in taken[0]] == [count for _, count in taken[1]]
    assert sum(count for _, count in taken[0]) == pytest.approx(20 * SEQ_LEN + 24 * 9)


def test_some_held_out_batches_are_spread_over_the_pass():
    data, documents = config(held_out=(source("a"),)), [numbered(80)]
    firsts = [
        int(batch["tokens"][0, 0])
        for batch, _ in held_out_batches(data, documents, rows=range(8), count=5)
    ]
    assert firsts == [1, 17, 33, 49, 65]
    assert len(list(held_out_batches(data, documents, rows=range(8), count=99))) == 10
    assert list(held_out_batches(data, [], rows=range(8), count=None)) == []


MESHES = [(8, 1, 1, 1), (2, 2, 2, 1), (1, 4, 1, 2), (2, 1, 1, 4), (1, 1, 4, 2), (1, 1, 1, 8)]


@pytest.mark.parametrize("sizes", MESHES)
def test_a_batch_arrives_on_the_devices_as_it_is(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    data, documents = config(batch_size=16), [varied(0)]
    rows = host_rows(mesh, 16)
    assert rows.tolist() == list(range(16))
    batches = make_batches(data, documents, rows=rows, seed=0, start_step=0)
    batch = next(batches)
    batches.close()
    arrays = to_device(batch, mesh)
    for name, dtype in FIELDS.items():
        assert arrays[name].dtype == dtype
        np.testing.assert_array_equal(np.asarray(arrays[name]), batch[name])
        shard = arrays[name].addressable_shards[0].data.shape
        assert math.prod(shard) * sizes[0] * sizes[1] * sizes[2] == 16 * SEQ_LEN


@pytest.mark.parametrize("sizes", MESHES)
def test_a_host_reads_the_rows_of_its_devices_and_no_other(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    sharding = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(("data", "fsdp"), "context")
    )
    for hosts in (1, 2, 4, 8):
        seen = set()
        for devices in np.split(mesh.devices.ravel(), hosts):
            rows = host_rows(mesh, 16, devices.tolist()).tolist()
            assert rows == sorted(set(rows))
            index = sharding.devices_indices_map((16, 16))
            held = {r for d in devices for r in range(*index[d][0].indices(16))}
            assert set(rows) == held
            seen |= held
        assert seen == set(range(16))


def test_a_batch_that_the_mesh_does_not_divide_says_what_fits():
    with pytest.raises(ConfigError, match=r"data\.batch_size: 12 rows .* a multiple of 8 fits"):
        host_rows(make_mesh(MeshConfig(data=8)), 12)
