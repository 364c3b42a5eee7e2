"""The model's own form of a parameter, to and from its canonical tensor: the one place for both."""

import math

import numpy as np

from llama_jax.interchange.tensors import EMBEDDING, Shape, input_dims

Path = tuple[str, ...]


class Layout:
    """How one parameter, without the leading layers, lies in its canonical tensor.

    A parameter is [in..., out...], its tensor [out, in] with each group of dims made one; the
    embedding is the same in both, a vector has only outputs.
    """

    def __init__(self, path: Path, shape: Shape) -> None:
        self.shape = shape
        self.inputs = input_dims(path)
        self.plain = self.inputs == 0 and len(shape) == 2 and path[-1] == EMBEDDING

    def slices(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The part of the tensor that a shard of the parameter comes from."""
        bounds = [slice(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        if self.plain:
            return tuple(bounds)
        outputs = self._merged(bounds, self.inputs, len(bounds))
        return (outputs, self._merged(bounds, 0, self.inputs)) if self.inputs else (outputs,)

    def from_tensor(self, values: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """That part in the parameter's own dims: a view, nothing is moved."""
        shape = [len(range(*part.indices(n))) for part, n in zip(index, self.shape, strict=True)]
        return values.reshape(shape) if self.plain else values.T.reshape(shape)

    def to_tensor(self, values: np.ndarray) -> np.ndarray:
        """The inverse for a whole parameter: a view."""
        if self.plain:
            return values
        inputs, outputs = math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])
        return values.reshape(inputs, outputs).T if self.inputs else values.reshape(outputs)

    def _merged(self, bounds: list[slice], first: int, end: int) -> slice:
        rest = math.prod(self.shape[first + 1 : end])
        whole = all(bounds[i] == slice(0, self.shape[i], 1) for i in range(first + 1, end))
        assert whole, "only the first dim of a group is split: heads stay whole"
        return slice(bounds[first].start * rest, bounds[first].stop * rest)
