"""Flags by chip: the table, a run's own over it, and what libtpu is told before JAX starts."""

import os
import shlex
import subprocess
import sys

import pytest

from llama_jax.config.files import load_run_config
from llama_jax.config.hardware import CHIPS, find_slice
from llama_jax.config.loading import ConfigError
from llama_jax.training import compiler_flags
from llama_jax.training.compiler_flags import (
    FLAGS,
    Flag,
    apply_flags,
    flags_for,
    set_compiler_flags,
)

V5E, V6E = CHIPS["v5e"], CHIPS["v6e"]
ROWS = (
    Flag("xla_a", "true", ("v5e", "v6e"), "why", "what"),
    Flag("xla_small", "8", ("v6e",), "why", "what", at_most_devices=16),
)
# libtpu refuses to compile with these on v5p and v6e, or says that results may be wrong.
REJECTED = ("xla_tpu_enable_async_collective_fusion", "xla_tpu_overlap_compute_collective_tc")


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(compiler_flags, "FLAGS", ROWS)


def tpu_vm(root, device="0x006f"):
    folder = root / "sys/bus/pci/devices/0000:00:04.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text("0x1ae0\n")
    (folder / "device").write_text(f"{device}\n")
    return root


def test_every_row_names_known_chips_and_says_why_and_what_it_did():
    for flag in FLAGS:
        assert set(flag.chips) <= set(CHIPS), flag.name
        assert flag.reason, flag.name
        assert any(character.isdigit() for character in flag.effect), f"{flag.name}: no figure"
        assert flag.value not in ("True", "False"), flag.name
    for name in ("v5p", "v6e"):
        for rejected in REJECTED:
            assert flags_for(CHIPS[name]).get(rejected) != "true"


def test_a_row_is_for_its_chips_and_sizes(rows):
    assert flags_for(V5E, 16) == {"xla_a": "true"}
    assert flags_for(V6E, 16) == {"xla_a": "true", "xla_small": "8"}
    assert flags_for(V6E, find_slice("v6e-16")) == {"xla_a": "true", "xla_small": "8"}
    assert flags_for(V6E, find_slice("v6e-64")) == {"xla_a": "true"}
    # A slice of unknown size isn't taken for a small one.
    assert flags_for(V6E) == {"xla_a": "true"}


def test_a_runs_own_flags_win_and_default_leaves_a_row_out(rows):
    own = {"xla_a": False, "xla_new": 3, "xla_small": "default"}
    assert flags_for(V6E, 16, own) == {"xla_a": "false", "xla_new": "3"}
    # The row is another chip's: nothing to leave out, and no slip either.
    assert flags_for(V5E, 16, {"xla_small": "default"}) == {"xla_a": "true"}
    with pytest.raises(ConfigError, match=r"we set no xla_smal \(did you mean 'xla_small'\?\)"):
        flags_for(V5E, 16, {"xla_smal": "default"})


def test_what_the_user_has_set_for_libtpu_stays_and_the_rest_is_added():
    environment = {"LIBTPU_INIT_ARGS": "--xla_a=false --noxla_b"}
    added, kept = apply_flags({"xla_a": "true", "xla_b": "true", "xla_c": "1"}, environment)
    assert environment["LIBTPU_INIT_ARGS"] == "--xla_a=false --noxla_b --xla_c=1"
    assert added == {"xla_c": "1"}
    assert kept == {"xla_a": "--xla_a=false", "xla_b": "--noxla_b"}
    untouched: dict[str, str] = {}
    apply_flags({}, untouched)
    assert untouched == {}


def test_train_on_a_tpu_sets_the_chips_flags_and_says_so(rows, tmp_path):
    environment = {
        "TPU_ACCELERATOR_TYPE": "v6e-16",
        "TPU_SKIP_MDS_QUERY": "1",
        "LIBTPU_INIT_ARGS": "--xla_a=false",
    }
    config = load_run_config("tiny", ["compiler.flags.xla_own=true"])
    line = set_compiler_flags(config, None, environment, tpu_vm(tmp_path))
    assert line == (
        "compiler flags for v6e-16: --xla_small=8 --xla_own=true "
        "--xla_a=false (as LIBTPU_INIT_ARGS has it)"
    )
    assert shlex.split(environment["LIBTPU_INIT_ARGS"]) == [
        "--xla_a=false", "--xla_small=8", "--xla_own=true",
    ]  # fmt: skip


def test_without_a_tpu_nothing_is_set_and_a_runs_own_flags_are_said_to_do_nothing(tmp_path):
    environment: dict[str, str] = {}
    assert set_compiler_flags(load_run_config("tiny"), None, environment, tmp_path) == ""
    own = load_run_config("tiny", ["compiler.flags.xla_own=1"])
    line = set_compiler_flags(own, None, environment, tmp_path)
    assert line == "compiler.flags are for TPUs, so here without effect: xla_own"
    # On a TPU VM too, when the run is told to use the CPU.
    environment["TPU_SKIP_MDS_QUERY"] = "1"
    assert set_compiler_flags(own, "cpu", environment, tpu_vm(tmp_path)) == line
    assert environment == {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("compiler.flags.--xla_a=1", "leave the dashes out"),
        ("compiler.flags.xla_a=[1]", "expected a string or true or false or an integer"),
        ("compiler.flag.xla_a=1", "did you mean 'flags'?"),
    ],
)
def test_a_wrong_compiler_table_is_one_line(setting, message):
    with pytest.raises(ConfigError, match="compiler") as caught:
        load_run_config("tiny", [setting])
    assert message in str(caught.value)


COMPILE = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from llama_jax.config.hardware import find_slice

slice_ = find_slice(sys.argv[1])
options = {"chip_config_name": name} if (name := slice_.chip.chip_config_name) else {}
devices = topologies.get_topology_desc(
    platform="tpu", topology_name=slice_.topology_name, **options
).devices
x = jax.ShapeDtypeStruct(
    (len(devices), 128), jnp.float32,
    sharding=NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x")),
)
jax.jit(lambda x: x.sum(0)).lower(x).compile()
print("compiled")
"""


def compile_with(arguments, slice_name):
    environment = {
        **os.environ, **compiler_flags_environment(), "LIBTPU_INIT_ARGS": " ".join(arguments),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", COMPILE, slice_name],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def compiler_flags_environment():
    from llama_jax.training.local_tpu import QUIET_ENVIRONMENT

    return {**QUIET_ENVIRONMENT, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-4", "tpu7x-8"])
def test_libtpu_takes_every_flag_of_the_table_from_its_variable(name):
    pytest.importorskip("libtpu")
    slice_ = find_slice(name)
    flags = flags_for(slice_.chip, slice_)
    done = compile_with([f"--{flag}={value}" for flag, value in flags.items()], name)
    assert done.stdout == "compiled\n", done.stderr[-2000:]


@pytest.mark.slow
def test_libtpu_does_read_the_variable_and_refuses_what_it_does_not_know():
    pytest.importorskip("libtpu")
    done = compile_with(["--xla_tpu_no_such_flag=1"], "v5e-4")
    assert done.returncode != 0
    assert "xla_tpu_no_such_flag" in done.stderr
