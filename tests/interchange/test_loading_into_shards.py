"""Loading on meshes: right values, right shardings, only the slices of a shard read."""

import itertools
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from in_memory import CONFIG, random_source
from tiny_checkpoints import CASES, F32, params_of, write_folder

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange import loading
from llama_jax.interchange.layout import Layout
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.tensors import BFLOAT16, InterchangeError, canonical_shapes
from llama_jax.models.accounting import param_shapes
from llama_jax.models.init import abstract_model
from llama_jax.sharding.mesh import make_mesh

MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "tensor 8": MeshConfig(fsdp=1, tensor=8),  # two key-value heads on eight ways: replicated
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(fsdp=1, context=4, tensor=2),
}


def shardings(model):
    return {path: param[...].sharding for path, param in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.short
@pytest.mark.parametrize("name", MESHES)
def test_sharded_parameters_equal_the_unsharded_ones(name):
    config = CASES["biased_yarn"]
    source = random_source(config)
    one = load_model(source, F32, make_mesh(MeshConfig(), jax.devices()[:1]))
    mesh = make_mesh(MESHES[name])
    model = load_model(source, F32, mesh)
    for path, values in params_of(one).items():
        np.testing.assert_array_equal(params_of(model)[path], values)
    wanted = nnx.to_flat_state(abstract_model(config, F32, mesh)[1])
    found = shardings(model)
    for path, leaf in wanted:
        assert found[path] == leaf.get_value().sharding, path
    assert not found[("layers", "mlp", "up_proj")].is_fully_replicated


@pytest.mark.parametrize("tied", [True, False])
def test_values_are_where_the_canonical_tensors_say(tied):
    config = CASES["grouped_llama3_tied" if tied else "grouped_llama3"]
    source = random_source(config)
    params = params_of(load_model(source, F32, make_mesh(MeshConfig())))
    assert {tuple(path.split(".")) for path in params} == set(param_shapes(config))
    arrays = source.arrays
    # Row n H + h of q_proj is output h of head n.
    q_DNH = params["layers.attention.q_proj"][1]
    assert q_DNH[5, 3, 7] == arrays["layers.1.attention.q_proj"][3 * 16 + 7, 5]
    o_NHD = params["layers.attention.o_proj"][0]
    assert o_NHD[3, 7, 5] == arrays["layers.0.attention.o_proj"][5, 3 * 16 + 7]
    assert params["layers.mlp.down_proj"][1][40, 9] == arrays["layers.1.mlp.down_proj"][9, 40]
    assert params["embedding"][50, 9] == arrays["embedding"][50, 9]
    if not tied:
        assert params["lm_head"][9, 50] == arrays["lm_head"][50, 9]


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_values_are_cast_to_the_dtype_of_parameters(stored, wanted):
    source = random_source(CONFIG, dtype=BFLOAT16 if stored == "bfloat16" else stored)
    execution = ExecutionConfig(param_dtype=wanted)
    params = params_of(load_model(source, execution, make_mesh(MeshConfig())))
    for path, values in params.items():
        assert values.dtype == np.dtype(BFLOAT16 if wanted == "bfloat16" else "float32"), path
    for name in ("embedding", "final_norm.scale"):
        np.testing.assert_array_equal(params[name], source.arrays[name].astype(values.dtype))
    ours_FD = params["layers.mlp.up_proj"][1].T
    np.testing.assert_array_equal(
        ours_FD, source.arrays["layers.1.mlp.up_proj"].astype(values.dtype)
    )


def spied(source, reads):
    """The source with each read's name and bounds noted."""

    class Spy:
        config, path, format = source.config, source.path, source.format
        stored_name = staticmethod(source.stored_name)
        tensors: dict = {}  # noqa: RUF012

    def watch(name, tensor):
        def read(slices):
            reads.append((name, tuple((part.start, part.stop) for part in slices)))
            return tensor.read(slices)

        return type(tensor)(**{**vars(tensor), "read": read})

    Spy.tensors = {name: watch(name, tensor) for name, tensor in source.tensors.items()}
    return Spy()


def test_each_slice_of_a_shard_is_read_once_and_nothing_else():
    reads = []
    source = spied(random_source(CONFIG), reads)
    load_model(source, F32, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert len(reads) == len(set(reads)), "a slice was read twice"
    # Heads over tensor, width over fsdp: four quarters, the same for both replicas.
    q = {bounds for name, bounds in reads if name == "layers.1.attention.q_proj"}
    assert q == {((a, a + 32), (b, b + 32)) for a in (0, 32) for b in (0, 32)}
    o = {bounds for name, bounds in reads if name == "layers.0.attention.o_proj"}
    assert o == {((a, a + 32), (b, b + 32)) for a in (0, 32) for b in (0, 32)}
    total = sum(np.prod([stop - start for start, stop in bounds]) for _, bounds in reads)
    assert total == sum(np.prod(shape) for shape in canonical_shapes(CONFIG).values())


def test_progress_is_told_to_the_end():
    told = []
    source = random_source(CONFIG)
    load_model(source, F32, make_mesh(MeshConfig()), progress=lambda *sizes: told.append(sizes))
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    assert len(told) == len(source.tensors)
    assert told[-1] == (total, total)
    assert all(a[0] < b[0] for a, b in itertools.pairwise(told))


def test_loaded_parameters_do_not_change_with_the_file(tmp_path):
    config = CASES["multi_head_plain"]
    folder = write_folder(tmp_path, config)
    model = load_model(open_source(folder), F32, make_mesh(MeshConfig(), jax.devices()[:1]))
    before = {name: values.copy() for name, values in params_of(model).items()}
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, values in params_of(model).items():
        np.testing.assert_array_equal(values, before[name])


def test_a_mesh_that_does_not_divide_the_model_is_told_before_anything_is_read():
    reads = []
    source = spied(random_source(CASES["grouped_llama3"]), reads)
    with pytest.raises(ConfigError, match="embedding: dim 'vocab' has size 64, which mesh ax"):
        load_model(source, F32, make_mesh(MeshConfig(fsdp=1, tensor=3), jax.devices()[:3]))
    assert not reads


def test_a_failed_read_is_raised_and_leaves_no_thread():
    source = random_source(CONFIG)
    reads = []
    broken = spied(source, reads)
    tensor = broken.tensors["layers.1.mlp.up_proj"]

    def fail(slices):
        raise OSError("the disk is gone")

    broken.tensors["layers.1.mlp.up_proj"] = type(tensor)(**{**vars(tensor), "read": fail})
    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        load_model(broken, F32, make_mesh(MeshConfig()))
    assert threading.active_count() == before


def test_of_several_processes_all_stop_where_one_finds_a_nan(monkeypatch):
    source = random_source(CONFIG)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    flags = np.array([False, True])
    monkeypatch.setattr(loading.multihost_utils, "process_allgather", lambda flag: flags)
    with pytest.raises(InterchangeError, match="arrays: process 1 found a NaN in its share"):
        loading.check_values_together(source)


def test_processes_share_out_the_search_for_nans():
    from llama_jax.interchange.checking import _share

    tensors = list(random_source(CONFIG).tensors.values())
    shares = [_share(tensors, index, 3) for index in range(3)]
    assert sorted(t.name for share in shares for t in share) == sorted(t.name for t in tensors)
    sizes = [sum(t.nbytes for t in share) for share in shares]
    assert max(sizes) < 1.3 * min(sizes)


def test_layouts_are_views_that_undo_each_other():
    for path, shape in param_shapes(CASES["biased_yarn"]).items():
        own = shape[1:] if path[0] == "layers" else shape
        layout = Layout(path, own)
        values = np.arange(np.prod(own), dtype=np.float32).reshape(own)
        tensor = layout.to_tensor(values)
        whole = tuple(slice(0, size) for size in own)
        back = layout.from_tensor(tensor, whole)
        np.testing.assert_array_equal(back, values)
        assert np.shares_memory(back, values)
