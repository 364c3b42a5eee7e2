"""From an opened checkpoint to a model on a mesh, each tensor straight into its shards.

The stacked arrays are made on the devices and filled layer by layer, so the host holds two
layers' worth of one tensor and no more. L layers.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config.run import ExecutionConfig
from llama_jax.interchange.checking import check_structure, check_values
from llama_jax.interchange.layout import Layout
from llama_jax.interchange.source import InterchangeError, Source
from llama_jax.interchange.tensors import StoredTensor
from llama_jax.models.init import abstract_model
from llama_jax.models.llama import Llama

# Called with the bytes read so far and those of all tensors.
Progress = Callable[[int, int], None]
Path = tuple[str, ...]


def load_model(
    source: Source, execution: ExecutionConfig, mesh: Mesh, *, progress: Progress | None = None
) -> Llama:
    """The model of an opened checkpoint, its parameters on the mesh in `execution.param_dtype`.

    A host reads only the slices that its devices hold (and its share of all tensors once before,
    looking for NaN).

    Raises:
      InterchangeError: a tensor that is missing, too many, misshapen or holds NaN; before any
        device memory is taken.
      ConfigError: the mesh doesn't divide a parameter.
    """
    graphdef, abstract = abstract_model(source.config, execution, mesh)
    check_structure(source)
    check_values_together(source)
    return nnx.merge(graphdef, load_params(source, abstract, mesh, progress=progress))


def load_params(
    source: Source,
    abstract: nnx.State,
    mesh: Mesh,
    *,
    instead: Mapping[str, StoredTensor] | None = None,
    progress: Progress | None = None,
) -> nnx.State:
    """Parameters of a checkpoint whose structure was checked, as `abstract` lays them out.

    Args:
      abstract: of all of its parameters or some.
      instead: tensors by canonical name that are taken for the checkpoint's own.
    """
    instead = instead or {}
    restore = getattr(source, "restore", None)
    restored, read = [], []
    for path, leaf in nnx.to_flat_state(abstract):
        # Only what lies in one piece is exchanged: the embedding, the head.
        by_tensor = restore is None or ".".join(map(str, path)) in instead
        (read if by_tensor else restored).append((path, leaf))
    params = []
    if restore is not None and restored:
        params = list(nnx.to_flat_state(restore(nnx.from_flat_state(restored))))
    tensors = {**source.tensors, **instead}
    read_state = load_tensors(tensors, nnx.from_flat_state(read), mesh, progress=progress)
    return nnx.from_flat_state([*params, *nnx.to_flat_state(read_state)])


def load_tensors(
    tensors: Mapping[str, StoredTensor],
    abstract: nnx.State,
    mesh: Mesh,
    *,
    progress: Progress | None = None,
) -> nnx.State:
    """The parameters of `abstract` from canonical tensors, such as an adapter's."""
    params = []
    with jax.set_mesh(mesh), _Reader(tensors, progress) as reader:
        for path, leaf in nnx.to_flat_state(abstract):
            array = _load(reader, tuple(map(str, path)), leaf.get_value())
            params.append((path, leaf.replace(array)))
    return nnx.from_flat_state(params)


def _load(reader: "_Reader", path: Path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    if path[0] != "layers":
        layout = Layout(path, leaf.shape)
        (part,) = reader.parts([".".join(path)], layout, sharding)
        return part if part.dtype == leaf.dtype else _cast(part, leaf.dtype)
    names = [".".join(("layers", str(i), *path[1:])) for i in range(leaf.shape[0])]
    layout = Layout(path, leaf.shape[1:])
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    for number, part in enumerate(reader.parts(names, layout, of_layer)):
        # Waited for, or the parts of many layers would queue up in memory.
        stack = jax.block_until_ready(_insert(stack, part, number))
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: jax.Array, part: jax.Array, layer: jax.Array | int) -> jax.Array:
    """`stack` with its `layer`-th slice replaced, in place; cast where the parts' memory is."""
    return jax.lax.dynamic_update_index_in_dim(stack, part.astype(stack.dtype), layer, axis=0)


@functools.partial(jax.jit, static_argnums=1)
def _cast(part: jax.Array, dtype: Any) -> jax.Array:
    return part.astype(dtype)


class _Reader:
    """Reads tensors in one thread, one ahead of the caller, and tells how far it is.

    One thread for all: what each further thread has freed would stay in its own heap.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], progress: Progress | None) -> None:
        self._tensors = tensors
        self._total = sum(tensor.nbytes for tensor in tensors.values())
        self._done, self._progress = 0, progress
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def parts(
        self, names: Sequence[str], layout: Layout, sharding: NamedSharding
    ) -> Iterator[jax.Array]:
        """Each tensor in its own dtype and the parameter's dims, the next one being read."""

        def read(name: str) -> Future[jax.Array]:
            return self._thread.submit(_part, self._tensors[name], layout, sharding)

        ahead = read(names[0])
        for number, name in enumerate(names, 1):
            part = ahead.result()
            self._add(self._tensors[name].nbytes)
            if number < len(names):
                ahead = read(names[number])
            yield part

    def _add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)


def _part(tensor: StoredTensor, layout: Layout, sharding: NamedSharding) -> jax.Array:
    """One tensor on its devices; each slice is read once a host."""
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        slices = layout.slices(index)
        place = tuple((part.start, part.stop) for part in slices)
        if place not in read:
            values = layout.from_tensor(tensor.read(slices), index)
            # A contiguous array might be taken over as it is: the parameter would be the file.
            read[place] = values.copy() if values.flags.c_contiguous else values
        return read[place]

    return jax.make_array_from_callback(layout.shape, sharding, shard, dtype=tensor.dtype)


def check_values_together(source: Source) -> None:
    """Each process looks at its share; all of them stop where one finds a NaN."""
    error: InterchangeError | None = None
    try:
        check_values(source, index=jax.process_index(), count=jax.process_count())
    except InterchangeError as found:
        error = found
    if jax.process_count() > 1:
        flags = multihost_utils.process_allgather(np.asarray(error is not None))
        if error is None and flags.any():
            raise InterchangeError(
                f"{source.path}: process {int(flags.argmax())} found a NaN in its share"
            )
    if error is not None:
        raise error
