"""Models with their parameters on a mesh, or without any memory."""

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import ExecutionConfig
from llama_jax.models.llama import Llama
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
