"""Real processes: each reads its own rows, and together they make the global arrays."""

import os
import socket
import subprocess
import sys

import pytest

HOST = """
import sys
import jax
import numpy as np

host, hosts, port = map(int, sys.argv[1:])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", hosts, host)

from llama_jax.config.run import DataConfig, MeshConfig, SourceConfig
from llama_jax.data.batches import make_batches
from llama_jax.data.device import host_rows, to_device
from llama_jax.data.documents import InMemoryDocuments
from llama_jax.sharding.mesh import make_mesh

documents = [InMemoryDocuments([[n] * (n % 7 + 2) for n in range(1, 60)])]
config = DataConfig(seq_len=8, batch_size=8, sources=(SourceConfig(name="a", shards="unused"),))


def batch(rows):
    batches = make_batches(config, documents, rows=rows, seed=0, start_step=4)
    first = next(batches)
    batches.close()
    return first


whole = batch(range(8))
# Batch split between the hosts; whole rows on both; half of each row on each; columns by fsdp.
for sizes, rows in [((2, 2, 1, 2), 4), ((1, 1, 1, 8), 8), ((1, 1, 2, 4), 8), ((1, 8, 1, 1), 4)]:
    mesh = make_mesh(MeshConfig(*sizes))
    mine = host_rows(mesh, 8)
    assert len(mine) == rows, (sizes, mine)
    arrays = to_device(batch(mine), mesh)
    for name, array in arrays.items():
        assert array.shape == (8, 8)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[name][shard.index])
print("same")
"""


@pytest.mark.slow
def test_two_processes_hold_the_shards_of_one_global_batch():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(host), "2", str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
        assert output.strip() == "same"
