"""A checkpoint made of arrays: what writers are given and readers are held against."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from llama_jax.config.model import Llama3Scaling, ModelConfig, RopeConfig
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.tensors import StoredTensor, canonical_shapes
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers.byte import ByteTokenizer

# Grouped heads, an untied head, all bands of llama3 scaling; widths that blocks of 32 divide.
CONFIG = ModelConfig(
    vocab_size=288,  # more rows than the byte tokenizer has ids
    embed_dim=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=96,
    max_seq_len=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, scaling=Llama3Scaling(factor=4.0, original_max_seq_len=64)),
    tie_embeddings=False,
)


@dataclasses.dataclass(frozen=True)
class ArraySource:
    config: ModelConfig
    arrays: dict
    tokenizer: object = dataclasses.field(default_factory=ByteTokenizer)
    chat_template: str | None = "{{ messages[0]['content'] }}"
    generation: GenerationDefaults = GenerationDefaults()
    format: str = "memory"
    path: Path = Path("arrays")

    @property
    def tensors(self):
        return {name: stored(name, array) for name, array in self.arrays.items()}

    def stored_name(self, name):
        return name

    def load_tokenizer(self):
        return self.tokenizer


def stored(name, array):
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[array.dtype.name]

    def read(part):
        return array[part]

    def has_nan():
        return bool(np.isnan(array).any())

    return StoredTensor(name, name, "arrays", array.shape, array.dtype, kind, read, has_nan)


def random_source(config=CONFIG, dtype=np.float32, seed=0, **fields):
    random = np.random.default_rng(seed)
    arrays = {}
    for name, shape in canonical_shapes(config).items():
        value = 0.15 * random.standard_normal(shape) + name.endswith("_norm.scale")
        arrays[name] = value.astype(np.float32).astype(dtype)
    return ArraySource(config, arrays, **fields)


def values_of(source):
    return {name: tensor.read_all() for name, tensor in source.tensors.items()}


def assert_bit_equal(source, other, *, norms=None):
    """The same tensors, the same bits; of 1-D ones the same values where `norms` is a dtype."""
    ours, theirs = values_of(source), values_of(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        wanted = array.astype(norms) if norms is not None and array.ndim == 1 else array
        assert theirs[name].dtype == wanted.dtype, name
        assert theirs[name].tobytes() == wanted.tobytes(), name


def logits(source, ids):
    """float32 [T, V] of the package's own network on one device."""
    execution = ExecutionConfig(compute_dtype="float32")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
        graphdef, params = nnx.split(load_model(source, execution, mesh))
        ids_BT = np.asarray(ids, np.int32)[None]

        @jax.jit
        def run(params, ids_BT):
            places_BT = jax.numpy.broadcast_to(jax.numpy.arange(ids_BT.shape[1]), ids_BT.shape)
            ones_BT = jax.numpy.ones_like(places_BT)
            model = nnx.merge(graphdef, params)
            return model(ids_BT, positions_BT=places_BT, segment_ids_BT=ones_BT)

        return np.asarray(run(params, ids_BT))[0]
