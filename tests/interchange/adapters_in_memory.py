"""Adapters made of arrays, what PEFT computes with those stored here, and what a model does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from in_memory import CONFIG, stored
from peft_reference import FOLDER, IDS

from llama_jax.config.post_training import AdapterConfig
from llama_jax.interchange.tensors import canonical_shapes

SETTINGS = AdapterConfig(rank=3, alpha=4.0, targets=("q_proj", "o_proj", "up_proj"))


def reference(name):
    return np.load(FOLDER / f"{name}.npy")


@dataclasses.dataclass(frozen=True)
class ArrayAdapter:
    """An adapter made of arrays."""

    config: AdapterConfig
    arrays: dict
    path: str = "arrays"
    partial: bool = False
    chat_template: str | None = None
    chat_format: str | None = None

    @property
    def tensors(self):
        return {name: stored(name, array) for name, array in self.arrays.items()}


def random_adapter(config=SETTINGS, seed=0, **more):
    random = np.random.default_rng(seed)
    names = canonical_shapes(CONFIG, config).items()
    arrays = {
        name: (0.3 * random.standard_normal(shape)).astype(np.float32) + name.endswith("_scale")
        for name, shape in names
        if "_lora_" in name or "_dora_" in name
    }
    return ArrayAdapter(config, {n: a.astype(np.float32) for n, a in arrays.items()}, **more)


def run_of(model, mesh):
    """Our float32 outputs of the ids by a model on a mesh."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, ids_BT):
        places_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
        made = nnx.merge(graphdef, params)
        return made(ids_BT, positions_BT=places_BT, segment_ids_BT=jnp.ones_like(ids_BT))

    with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
        return np.asarray(run(params, np.stack([IDS, IDS])))[0]
