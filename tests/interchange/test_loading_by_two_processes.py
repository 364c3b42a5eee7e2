"""Two processes that load one checkpoint together: each reads its own part, all stop at a NaN."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from in_memory import CONFIG, random_source

from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.orbax import write_orbax
from llama_jax.interchange.tensors import canonical_shapes

pytestmark = pytest.mark.slow

PROCESS = """
import dataclasses, json, math, sys
import jax
import numpy as np
from flax import nnx
port, index, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.opening import open_source
from llama_jax.sharding.mesh import make_mesh

source = open_source(folder)
read = [0]

def counted(tensor):
    def one(slices):
        read[0] += math.prod(s.stop - s.start for s in slices) * tensor.dtype.itemsize
        return tensor.read(slices)
    return dataclasses.replace(tensor, read=one)

source.tensors = {name: counted(tensor) for name, tensor in source.tensors.items()}
mesh = make_mesh(MeshConfig(fsdp=8))
try:
    model = load_model(source, ExecutionConfig(), mesh)
except ValueError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()
sums = {
    ".".join(map(str, path)): float(jax.jit(lambda x: (x * x).sum())(param[...]))
    for path, param in nnx.to_flat_state(nnx.state(model))
}
print(json.dumps({"read": read[0], "sums": sums}))
"""


def together(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(index), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    # Gloo talks on stdout too.
    lines = [[x for x in printed.splitlines() if x.startswith("{")] for printed, _ in outputs]
    return [json.loads(found[-1]) for found in lines]


def squares(source):
    """Sum of squares of each parameter of the model."""
    sums = {}
    for name, array in source.arrays.items():
        path = ".".join(part for part in name.split(".") if not part.isdigit())
        sums[path] = sums.get(path, 0.0) + float((array.astype(np.float64) ** 2).sum())
    return sums


def test_each_process_reads_only_what_its_devices_hold(tmp_path):
    source = random_source()
    write_hugging_face(source, tmp_path)
    results = together(tmp_path)
    for result in results:
        assert result["sums"] == pytest.approx(squares(source), rel=1e-4)
    # Width over fsdp, half of it on each process; norms are on both.
    sizes = [4 * int(np.prod(shape)) for shape in canonical_shapes(CONFIG).values()]
    norms = sum(4 * shape[0] for shape in canonical_shapes(CONFIG).values() if len(shape) == 1)
    half = (sum(sizes) - norms) // 2 + norms
    assert [result["read"] for result in results] == [half, half]


def test_an_orbax_folder_is_restored_by_both(tmp_path: Path):
    source = random_source()
    write_orbax(source, tmp_path)
    for result in together(tmp_path):
        assert result["sums"] == pytest.approx(squares(source), rel=1e-4)


def test_both_stop_where_one_finds_a_nan(tmp_path):
    source = random_source()
    source.arrays["embedding"][5, 5] = np.nan
    write_hugging_face(source, tmp_path)
    errors = sorted(result["error"] for result in together(tmp_path))
    assert any("tensor model.embed_tokens.weight holds a NaN" in error for error in errors)
    assert any("found a NaN in its share" in error for error in errors)
