"""The one form in which all formats meet: canonical names, [out, in] matrices, read lazily.

A format translates its names, shapes and row orders to and from this; only `loading` knows how the
model itself keeps its parameters. V vocabulary, D width, N query heads, K key-value heads, H head
dim, F MLP width.

embedding, lm_head            [V, D]; no lm_head where it is the embedding
reward_head                   [D], a reward model's instead of lm_head
final_norm.scale              [D]
layers.{i}.*_norm.scale       [D], attn_norm and mlp_norm
layers.{i}.attention.*_proj   q [N H, D], k and v [K H, D], o [D, N H], and *_bias [out]
layers.{i}.mlp.*_proj         gate and up [F, D], down [D, F], and *_bias [out]
layers.{i}.*_proj_lora_a      [U, in], an adapter of rank U; *_lora_b [out, U], *_dora_scale [out]
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import AdapterConfig


class InterchangeError(ValueError):
    """A checkpoint that can't be read or written: one line naming the file, tensor or field."""


Slices = tuple[slice, ...]
Shape = tuple[int, ...]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Dtypes that parameters are stored and written in, by the names that options and configs use.
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
EMBEDDING, LM_HEAD, FINAL_NORM = "embedding", "lm_head", "final_norm.scale"
REWARD_HEAD = "reward_head"
# Bytes of one piece where a tensor is gone through piece by piece.
PIECE_BYTES = 64 * 2**20
# The same where values are only looked at: what fits the caches is gone through faster.
_GLANCE_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, in canonical form; nothing of it is read until asked for.

    Rows of q and k are in half-split rotary order, whatever the file's.

    Attributes:
      name: canonical, or as in the file for one that no name of the model stands for.
      stored_name: as in its file, for messages.
      file: for messages.
      shape: [out, in] or [size].
      dtype: as stored; float32 for quantised blocks, which `read` dequantises.
      kind: how it is stored, such as "BF16" or "Q4_K".
      read: only the asked-for part is read from disk, a fresh or read-only array in `dtype`. One
        slice a dim, step 1, bounds given; rows of q and k are asked for by whole heads.
      has_nan: reads it piece by piece; of quantised blocks only the scales.
    """

    name: str
    stored_name: str
    file: str
    shape: Shape
    dtype: np.dtype
    kind: str
    read: Callable[[Slices], np.ndarray]
    has_nan: Callable[[], bool]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole in `dtype`."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_all(self) -> np.ndarray:
        """The whole tensor."""
        return self.read(tuple(slice(0, size) for size in self.shape))


@functools.lru_cache(maxsize=64)
def canonical_shapes(config: ModelConfig, adapter: AdapterConfig | None = None) -> dict[str, Shape]:
    """Every canonical name of a model, or of one with an adapter, with its shape.

    In the order of the network.

    From the model's own parameters, so that a new one can't be forgotten by a format. Treat it
    as read-only.
    """
    # Imported here: the names alone are of use to readers that never touch the network.
    from llama_jax.models.accounting import param_shapes

    once, layered = {}, {}
    for path, shape in param_shapes(config, adapter).items():
        if path[0] == "layers":
            layered[path[1:]] = canonical_shape(path, shape[1:])
        else:
            once[".".join(path)] = canonical_shape(path, shape)
    shapes = {EMBEDDING: once.pop(EMBEDDING)}
    for i in range(config.num_layers):
        shapes |= {".".join(("layers", str(i), *path)): shape for path, shape in layered.items()}
    return shapes | once


def canonical_shape(path: tuple[str, ...], shape: Shape) -> Shape:
    """[out, in] of one parameter kept as [in..., out...]; vectors and the embedding as they are.

    Args:
      path: of the parameter, such as ("layers", "attention", "q_proj").
      shape: without the leading layers.
    """
    inputs = input_dims(path)
    if inputs == 0:
        return shape if path[-1] == EMBEDDING else (math.prod(shape),)
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def input_dims(path: tuple[str, ...]) -> int:
    """How many leading dims of a parameter are its inputs: two of o_proj, none of a vector."""
    # The first factor of an adapter has its projection's inputs, the second the rank alone.
    name = path[-1].removesuffix("_lora_a")
    if name == "o_proj":
        return 2
    return 1 if name.endswith(("_proj", "_lora_b")) or name == LM_HEAD else 0


def head_rows(name: str) -> bool:
    """Whether rows of this canonical name, projection or bias, are turned by rotary pairs."""
    return name.rpartition(".")[2] in ("q_proj", "k_proj", "q_bias", "k_bias")


def pieces(
    shape: Shape, itemsize: int, *, multiple: int = 1, most: int | None = None
) -> Iterator[Slices]:
    """Slices by rows that cover a tensor, each of at most `most` bytes or `multiple` rows.

    Args:
      most: default `PIECE_BYTES`.
      multiple: rows of a piece are a multiple of this (but for the last), such as a head's.
    """
    row_bytes = math.prod(shape[1:]) * itemsize
    most = PIECE_BYTES if most is None else most
    rows = max(most // max(row_bytes, 1) // multiple, 1) * multiple
    others = tuple(slice(0, size) for size in shape[1:])
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *others)


def any_nan(
    read: Callable[[Slices], np.ndarray], shape: Shape, dtype: np.dtype, *, multiple: int = 1
) -> bool:
    """Whether an unquantised tensor holds a NaN, looked for piece by piece."""
    parts = pieces(shape, dtype.itemsize, multiple=multiple, most=_GLANCE_BYTES)
    return any(has_nan(read(part)) for part in parts)


def has_nan(values: np.ndarray) -> bool:
    """Whether an array of float32, float16 or bfloat16 holds a NaN."""
    if values.size == 0:
        return False
    if values.dtype.itemsize == 4:
        # The largest of values with a NaN among them is NaN: one pass, and no array of flags.
        with np.errstate(invalid="ignore"):
            return bool(np.isnan(values.max()))
    # By the bits: NumPy goes through 16-bit floats one at a time. Without its sign, a NaN's
    # pattern is over infinity's.
    infinity = np.asarray(np.inf, values.dtype).view(np.uint16)
    return bool((values.view(np.uint16) & np.uint16(0x7FFF)).max() > infinity)
