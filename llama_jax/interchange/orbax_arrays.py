"""The model's own stacked arrays in an Orbax folder, seen as canonical tensors. L layers."""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from llama_jax.config.loading import nearest
from llama_jax.config.model import ModelConfig
from llama_jax.interchange.layout import Layout
from llama_jax.interchange.safetensors_reading import KINDS
from llama_jax.interchange.tensors import (
    InterchangeError,
    Shape,
    Slices,
    StoredTensor,
    canonical_shape,
    has_nan,
)
from llama_jax.models.accounting import param_shapes

# Arrays that were read last are kept up to these bytes: a small model as a whole, of a large one
# the array that is being gone through.
_KEPT_BYTES = 2 * 2**30
_KIND_OF = {dtype: kind for kind, dtype in KINDS.items()}


class StackedArrays:
    """The parameters of a model in one Orbax folder, each an array with all its layers."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        *,
        prefix: str = "",
        shapes: Mapping[tuple[str, ...], Shape] | None = None,
    ) -> None:
        """Read the folder's metadata.

        Args:
          prefix: before the parameters' names, where there are other arrays in the folder.
          shapes: of the parameters that are stored, by path; by default all of the model.

        Raises:
          InterchangeError: it can't be read, or isn't of this model.
        """
        self.folder = folder
        self._shapes = param_shapes(config) if shapes is None else shapes
        self._handler = ocp.PyTreeCheckpointHandler()
        self._kept: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        stored = {key: v for key, v in self._metadata().items() if key.startswith(prefix)}
        # A train state's leaves are named by flax, whose parameters may hold a `value`.
        suffix = ".value" if any(key.endswith(".value") for key in stored) else ""
        self._keys = {path: f"{prefix}{'.'.join(path)}{suffix}" for path in self._shapes}
        self._dtypes = self._checked(stored)

    def tensors(self) -> dict[str, StoredTensor]:
        """By canonical name, array by array: their order is the one to read them in."""
        return {tensor.name: tensor for tensor in self._tensors()}

    def restore(self, abstract: nnx.State) -> nnx.State:
        """The parameters laid out and cast as `abstract` says; each device reads its own shards.

        Raises:
          InterchangeError: an array that can't be read.
        """
        leaves = {
            self._keys[tuple(map(str, path))]: leaf.get_value()
            for path, leaf in nnx.to_flat_state(abstract)
        }
        arguments = {
            key: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
            )
            for key, leaf in leaves.items()
        }
        with self._lock:
            self._kept.clear()
        # Orbax would have all arrays under way at once, each through a copy on the host.
        largest = max(math.prod(leaf.shape) * 4 for leaf in leaves.values())
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + 2 * largest // 10**9)
        found = self._read(arguments, handler)
        return nnx.from_flat_state(
            [
                (path, leaf.replace(found[self._keys[tuple(map(str, path))]]))
                for path, leaf in nnx.to_flat_state(abstract)
            ]
        )

    def _metadata(self) -> Mapping[str, Any]:
        try:
            metadata: Any = self._handler.metadata(epath.Path(self.folder))
        except Exception as error:
            raise InterchangeError(f"{self.folder}: {_one_line(error)}") from error
        return metadata.tree

    def _checked(self, stored: Mapping[str, Any]) -> dict[str, np.dtype]:
        dtypes = {}
        for path, shape in self._shapes.items():
            key = self._keys[path]
            if key not in stored:
                raise InterchangeError(
                    f"{self.folder}: array {key} is missing{nearest(key, list(stored))}"
                )
            if tuple(stored[key].shape) != shape:
                raise InterchangeError(
                    f"{self.folder}: array {key} has shape {list(stored[key].shape)}; "
                    f"the config asks for {list(shape)}"
                )
            dtypes[key] = np.dtype(stored[key].dtype)
        for key in sorted(stored.keys() - dtypes.keys()):
            raise InterchangeError(
                f"{self.folder}: array {key} has no place in the model that its config describes"
            )
        return dtypes

    def _tensors(self) -> Iterator[StoredTensor]:
        for path, shape in self._shapes.items():
            key = self._keys[path]
            make = functools.partial(self._tensor, path, key)
            if path[0] != "layers":
                yield make(".".join(path), shape, None)
                continue
            for layer in range(shape[0]):
                yield make(".".join(("layers", str(layer), *path[1:])), shape[1:], layer)

    def _tensor(
        self, path: tuple[str, ...], key: str, name: str, shape: Shape, layer: int | None
    ) -> StoredTensor:
        layout = Layout(path, shape)

        def whole() -> np.ndarray:
            array = self._array(key)
            return layout.to_tensor(array if layer is None else array[layer])

        def read(slices: Slices) -> np.ndarray:
            return whole()[slices]

        place = "" if layer is None else f"[{layer}]"
        return StoredTensor(
            name=name,
            stored_name=f"{key}{place}",
            file=str(self.folder / key),
            shape=canonical_shape(path, shape),
            dtype=self._dtypes[key],
            kind=_KIND_OF[self._dtypes[key]],
            read=read,
            has_nan=lambda: has_nan(whole()),
        )

    def _array(self, key: str) -> np.ndarray:
        # One at a time: threads that each read another array would hold them all.
        with self._lock:
            if key not in self._kept:
                as_numpy = {key: ocp.RestoreArgs(restore_type=np.ndarray)}
                array = self._read(as_numpy, self._handler)[key]
                while self._kept and self._kept_bytes() + array.nbytes > _KEPT_BYTES:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = array
            return self._kept[key]

    def _kept_bytes(self) -> int:
        return sum(array.nbytes for array in self._kept.values())

    def _read(
        self, arguments: Mapping[str, ocp.RestoreArgs], handler: ocp.PyTreeCheckpointHandler
    ) -> dict[str, Any]:
        wanted = ocp.args.PyTreeRestore(
            item=dict.fromkeys(arguments, 0), restore_args=dict(arguments), partial_restore=True
        )
        try:
            return handler.restore(epath.Path(self.folder), args=wanted)
        except Exception as error:
            names = next(iter(arguments)) if len(arguments) == 1 else "arrays"
            raise InterchangeError(f"{self.folder}: {names}: {_one_line(error)}") from error


def save_stacked(
    folder: Path, config: ModelConfig, read: Callable[[str, np.dtype], np.ndarray],
    dtypes: Mapping[str, np.dtype],
) -> None:  # fmt: skip
    """The parameters as one Orbax tree of stacked arrays, flat, by path joined by points.

    Orbax takes the tree as a whole: the host holds all parameters once.

    Args:
      read: a whole canonical tensor by name in a dtype.
      dtypes: of the canonical tensors; layers that differ are stored in float32.
    """
    tree = {}
    for path, shape in param_shapes(config).items():
        name = ".".join(path)
        if path[0] != "layers":
            tree[name] = _from_tensor(path, shape, read(name, dtypes[name]))
            continue
        names = [".".join(("layers", str(i), *path[1:])) for i in range(shape[0])]
        found = {dtypes[name] for name in names}
        dtype = found.pop() if len(found) == 1 else np.dtype(np.float32)
        tree[name] = np.empty(shape, dtype)
        for layer, part in enumerate(names):
            tree[name][layer] = _from_tensor(path, shape[1:], read(part, dtype))
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(folder, args=ocp.args.PyTreeSave(tree))


def _from_tensor(path: tuple[str, ...], shape: Shape, values: np.ndarray) -> np.ndarray:
    whole = tuple(slice(0, size) for size in shape)
    return Layout(path, shape).from_tensor(values, whole)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
