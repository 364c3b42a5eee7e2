"""Models with their parameters on a mesh, or without any memory."""

import dataclasses
import functools

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import ExecutionConfig
from llama_jax.models.llama import Llama
from llama_jax.models.lora import DORA_SCALE, num_inputs, output_norms
from llama_jax.sharding.rules import Dims, param_spec

Path = tuple[str, ...]


def make_model(
    config: ModelConfig,
    execution: ExecutionConfig,
    mesh: Mesh,
    seed: int,
    adapter: AdapterConfig | None = None,
) -> Llama:
    """A freshly initialised model, each parameter made on the devices that store it.

    Its weights don't depend on the adapter.

    Raises:
      ConfigError: the mesh doesn't divide a parameter.
    """
    graphdef, _ = abstract_model(config, execution, mesh, adapter)

    def init() -> nnx.State:
        return nnx.state(Llama(config, execution, adapter, rngs=nnx.Rngs(seed)))

    with jax.set_mesh(mesh):
        return nnx.merge(graphdef, jax.jit(init, compiler_options=_run_once(mesh))())


def abstract_model(
    config: ModelConfig,
    execution: ExecutionConfig,
    mesh: Mesh,
    adapter: AdapterConfig | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph, and shapes with dtypes and shardings in place of parameters. Uses no memory.

    Raises:
      ConfigError: the mesh doesn't divide a parameter.
    """

    def shape_of(path: tuple[object, ...], param: nnx.Variable) -> nnx.Variable:
        spec = param_spec(dims[tuple(map(str, path))], param.shape, mesh, ".".join(map(str, path)))
        sharding = NamedSharding(mesh, spec)
        return param.replace(jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=sharding))

    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: Llama(config, execution, adapter, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    dims = param_dims(state)
    return graphdef, nnx.map_state(shape_of, state)


def init_added(
    abstract: nnx.State,
    weights: nnx.State,
    config: ModelConfig,
    execution: ExecutionConfig,
    mesh: Mesh,
    seed: int,
    adapter: AdapterConfig | None,
) -> nnx.State:
    """The fresh parameters that a model has beside those of a checkpoint: adapters, a reward head.

    As `make_model` draws them from the same seed; magnitudes of DoRA are the weights' own.

    Args:
      abstract: of these parameters, from `abstract_model`.
      weights: the checkpoint's.
    """
    # Without magnitudes, so that nothing that is asked for depends on the weights drawn beside it.
    plain = adapter and dataclasses.replace(adapter, dora=False)
    wanted = dict(nnx.to_flat_state(abstract))
    loaded = dict(nnx.to_flat_state(weights))

    def init() -> dict[object, jax.Array]:
        state = nnx.state(Llama(config, execution, plain, rngs=nnx.Rngs(seed)))
        return {path: leaf[...] for path, leaf in nnx.to_flat_state(state) if path in wanted}

    with jax.set_mesh(mesh):
        values = dict(jax.jit(init, compiler_options=_run_once(mesh))()) if wanted else {}
        for path in wanted.keys() - values.keys():
            *parents, name = path
            proj = str(name).removesuffix(DORA_SCALE)
            values[path] = _stacked_norms(loaded[(*parents, proj)][...], num_inputs(proj))
    return nnx.from_flat_state(
        [(path, leaf.replace(values[path])) for path, leaf in wanted.items()]
    )


@functools.partial(jax.jit, static_argnums=1)
def _stacked_norms(w: jax.Array, inputs: int) -> jax.Array:
    return jax.lax.map(lambda layer: output_norms(layer, inputs), w)


def param_dims(state: nnx.State) -> dict[Path, Dims]:
    """Logical dims of each parameter by path, such as ("layers", "mlp", "up_proj").

    Those of the stacked layers open with "layers".
    """
    stacked = {"layers": ("layers",)}
    return {
        tuple(map(str, path)): (*stacked.get(str(path[0]), ()), *param.get_metadata("dims"))
        for path, param in nnx.to_flat_state(state)
    }


def _run_once(mesh: Mesh) -> dict[str, int]:
    # On a CPU, optimising the random number generator for each shape takes seconds, running it
    # as it is milliseconds.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": 0} if on_cpu else {}
