"""What takes the room in a compiled step, against the compiler's totals and sizes by hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from tpu_programs import compiled, devices, on_mesh

from llama_jax.planning.memory_report import memory_report, read_memory_report
from llama_jax.planning.memory_report_categories import Namer
from llama_jax.planning.program_text import ProgramError, parse

LAYERS, D, F, TOKENS, DEVICES = 16, 256, 256, 32768, 4
ACTIVATION = TOKENS * D * 2
WEIGHTS = 2 * LAYERS * D * F * 4 // DEVICES


class State(NamedTuple):
    params: Any
    opt_state: Any


def gather(weight):
    return lax.all_gather(weight.astype(jnp.bfloat16), "fsdp", axis=0, tiled=True)


def step(*args):
    """Momentum on a scanned MLP, its weights sharded and gathered, a layer's input kept."""
    state, batch = args

    @jax.checkpoint
    def layer(x, w):
        return x + jnp.sin(x @ gather(w["up"])) @ gather(w["down"]), None

    def loss(params):
        x, _ = lax.scan(layer, batch["x"], params["layers"])
        return lax.psum(jnp.square(x.astype(jnp.float32)).sum(), "fsdp")

    gradients = jax.grad(loss)(state.params)
    moments = jax.tree.map(lambda m, g: 0.9 * m + g, state.opt_state, gradients)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state.params, moments)
    return State(params, moments)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    """The step compiled for v5e, with more than its 128 MiB of VMEM hold, and the dump's folder."""
    folder = tmp_path_factory.mktemp("dump")
    found = np.asarray(devices("v5e:2x2"))
    mesh = Mesh(found, ("fsdp",), axis_types=(AxisType.Auto,))
    sharded, rows = (None, "fsdp", None), ("fsdp", None)
    weights = {
        "layers": {
            "up": on_mesh(mesh, (LAYERS, D, F), sharded, jnp.float32),
            "down": on_mesh(mesh, (LAYERS, F, D), sharded, jnp.float32),
        }
    }
    specs = jax.tree.map(lambda _: P(*sharded), State(weights, weights))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs, {"x": P(*rows)}), out_specs=specs)

    def named(*args):
        return mapped(*args)

    program = compiled(
        named,
        State(weights, weights),
        {"x": on_mesh(mesh, (DEVICES * TOKENS, D), rows)},
        options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True},
        donate_argnums=0,
    )
    return program, folder


@pytest.mark.slow
def test_the_totals_are_the_compilers(dumped):
    program, folder = dumped
    report, memory = read_memory_report(folder), program.memory_analysis()
    assert report.argument_bytes == memory.argument_size_in_bytes
    assert report.temp_bytes == pytest.approx(memory.temp_size_in_bytes, rel=0.01)
    assert sum(report.by_category.values()) == report.argument_bytes + report.temp_bytes
    assert report.by_category["unused"] >= 0


@pytest.mark.slow
def test_the_state_and_the_batch_have_their_bytes(dumped):
    found = read_memory_report(dumped[1]).by_category
    assert found["parameters"] == WEIGHTS
    assert found["optimizer_state"] == WEIGHTS
    assert found["batch"] == ACTIVATION


@pytest.mark.slow
def test_what_the_layers_keep_is_told_apart(dumped):
    report = read_memory_report(dumped[1])
    # At the peak, in the backward loop, all layers' inputs are kept.
    assert report.by_category["saved_activations"] == LAYERS * ACTIVATION
    sizes = [buffer.bytes for buffer in report.buffers]
    assert sizes == sorted(sizes, reverse=True)
    names = {buffer.name for buffer in report.buffers if buffer.category == "parameters"}
    assert names == {f"args[0].params['layers']['{name}']" for name in ("up", "down")}


def test_a_folder_without_a_dump_is_an_error(tmp_path):
    with pytest.raises(ProgramError, match="no dump of a compiled program"):
        read_memory_report(tmp_path)


PROGRAM = """HloModule m

ENTRY %main (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0), metadata={op_name="args[1][\\'tokens\\']"}
  %b = f32[256]{0} negate(%a)
  %c = f32[256]{0} negate(%b)
  ROOT %d = f32[256]{0} negate(%c)
}
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 1024, page 0, parameter 0, shape |f32[256]| at ShapeIndex {}:
 value: <0 a @0> (size=1024,offset=0): f32[256]{0}
allocation 1: size 3072, page 0, preallocated-temp:
 value: <1 b @0> (size=1024,offset=0): f32[256]{0}
 value: <2 c @0> (size=1024,offset=1024): f32[256]{0}
 value: <3 e{0} (phi) @0> (size=1024,offset=1024): f32[256]{0}
allocation 2: size 1024, color 1, page 0, preallocated-temp:
 value: <4 d @1> (size=1024,offset=0): f32[256]{0}
"""
RANGES = """HloLiveRange (max 4):
  InstructionSequence:
    0:a
    1:b
    2:c
    3:d
  BufferLiveRange:
    a{}:0-4
    b{}:1-2
    c{}:2-3
    e{0}:2-4
    d{}:3-4
"""


def test_values_in_one_place_count_once_and_other_memories_not_at_all():
    report = memory_report(PROGRAM, ASSIGNMENT, RANGES)
    assert (report.argument_bytes, report.temp_bytes, report.peak_at) == (1024, 3072, "c")
    assert report.by_category == {"temporaries": 2048, "batch": 1024, "unused": 1024}


LAYERED = """HloModule m

ENTRY %main (w: f32[4,64,256], e: f32[1000,64]) -> f32[4,64,256] {
  %w = f32[4,64,256]{2,1,0} parameter(0), metadata={op_name="args[0].params[\\'layers\\'][\\'up\\']"}
  %e = f32[1000,64]{1,0} parameter(1), metadata={op_name="args[0].params[\\'embedding\\']"}
  %c = bf16[4,64,256]{2,1,0} convert(%w)
  %g = bf16[1,256,256]{2,1,0} all-gather(%c), dimensions={1}, metadata={op_name="jvp()/while"}
  %s = bf16[4,2048,256]{2,1,0} negate(%g), metadata={op_name="jvp()/while"}
  %l = f32[2048,1000]{1,0} negate(%s), metadata={op_name="jvp()/CD,DV->CV"}
  %d = f32[256,256]{1,0} negate(%l), metadata={op_name="transpose(jvp())/dot_general"}
  %x = bf16[2048,256]{1,0} negate(%d), metadata={op_name="transpose(jvp())/add"}
  %m = bf16[2048,256]{1,0:S(1)} copy(%x)
  ROOT %a = f32[4,64,256]{2,1,0} negate(%d), metadata={op_name="transpose(jvp())/while"}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "category", "title"),
    [
        ("w", "parameters", "args[0].params['layers']['up']"),
        ("c", "gathered_weights", "args[0].params['layers']['up']"),
        ("g", "gathered_weights", "jvp()/while"),
        ("s", "saved_activations", "jvp()/while"),
        ("l", "loss", "jvp()/CD,DV->CV"),
        ("d", "gradients", "transpose(jvp())/dot_general"),
        ("a", "gradients", "transpose(jvp())/while"),
        ("x", "temporaries", "transpose(jvp())/add"),
        ("m", "temporaries", "transpose(jvp())/add"),
    ],
)
def test_a_value_is_what_its_path_and_shape_say(name, category, title):
    program = parse(LAYERED)
    namer = Namer(program)
    shape = program.computations["main"].instructions[name].shape
    assert (namer.category(name, shape), namer.title(name)) == (category, title)


def test_an_empty_text_is_an_error():
    with pytest.raises(ProgramError, match="live ranges hold no values"):
        memory_report(PROGRAM, ASSIGNMENT, "")
    with pytest.raises(ProgramError, match="assignment holds no values"):
        memory_report(PROGRAM, "", RANGES)
