"""How much host memory loading takes beyond the parameters, measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import CASES, config_table, write_by_hand

from llama_jax.interchange.hugging_face_names import to_hugging_face
from llama_jax.interchange.tensors import canonical_shapes

pytestmark = pytest.mark.slow

MIB = 2**20
# A quarter of a gigabyte whose largest tensor is 32 MiB, of 16-bit values that are widened.
CONFIG = type(CASES["linear"])(
    **{
        **vars(CASES["linear"]),
        **{"vocab_size": 16384, "embed_dim": 1024, "num_layers": 8, "num_heads": 16},
        **{"num_kv_heads": 16, "head_dim": 64, "mlp_dim": 2048, "tie_embeddings": True},
    }
)
MEASURE = """
import resource, sys, threading
import jax
from flax import nnx
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.opening import open_source
from llama_jax.sharding.mesh import make_mesh

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], resident())

folder, dtype = sys.argv[1:]
execution = ExecutionConfig(param_dtype=dtype)
mesh = make_mesh(MeshConfig())
# Compiled once before: what the compiler itself takes is no part of the matter.
jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(3)))
source = open_source(folder)
before, peak, done = resident(), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(source, execution, mesh)
done.set()
watcher.join()
print(sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))), peak[0] - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(config_table(CONFIG)))
    # Small positive numbers by their bits: made quickly, and no NaN among them.
    random = np.random.default_rng(0)
    tensors = {
        to_hugging_face(name): random.integers(0x3C00, 0x3C80, shape, np.uint16)
        for name, shape in canonical_shapes(CONFIG).items()
    }
    write_by_hand(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_host_holds_the_parameters_and_a_few_tensors(folder, dtype):
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc to measure by")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), dtype],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    size, peak = (int(word) for word in result.stdout.split())
    largest = 16384 * 1024 * (4 if dtype == "float32" else 2)
    assert size == sum(np.prod(s) for s in canonical_shapes(CONFIG).values()) * (
        4 if dtype == "float32" else 2
    )
    beyond = peak - size
    print(f"{dtype}: parameters {size / MIB:.0f} MiB, beyond {beyond / MIB:.0f} MiB, "
          f"largest tensor {largest / MIB:.0f} MiB")  # fmt: skip
    # Two copies of the largest tensor, and what the compiler takes.
    assert beyond < 2 * largest + 48 * MIB
