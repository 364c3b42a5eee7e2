"""A checkpoint held against its own config before any device memory is taken."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llama_jax.config.loading import nearest
from llama_jax.interchange.source import InterchangeError, Source
from llama_jax.interchange.tensors import (
    EMBEDDING,
    LM_HEAD,
    StoredTensor,
    canonical_shapes,
    pieces,
)


def check_source(source: Source) -> None:
    """Every tensor there, none too many, of the right shape and dtype, and no NaN in it.

    Raises:
      InterchangeError: naming the first tensor at fault.
    """
    check_structure(source)
    check_values(source)


def check_structure(source: Source) -> None:
    """Names, shapes and dtypes; of values only a head that is stored though it is tied.

    Raises:
      InterchangeError: a tensor that is missing, too many or misshapen; a tied head that differs.
    """
    wanted, tensors = canonical_shapes(source.config), source.tensors
    config = source.config
    tied_head = config.head == "vocab" and config.tie_embeddings and LM_HEAD in tensors
    extra = [name for name in tensors if name not in wanted and not (tied_head and name == LM_HEAD)]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise InterchangeError(_missing(source, missing, extra))
    if extra:
        raise InterchangeError(_extra(source, tensors[extra[0]], list(wanted)))
    for name, shape in wanted.items():
        _check_shape(tensors[name], shape)
    if tied_head:
        _check_shape(tensors[LM_HEAD], wanted[EMBEDDING])
        _check_equal(tensors[LM_HEAD], tensors[EMBEDDING])


def check_values(source: Source, *, index: int = 0, count: int = 1) -> None:
    """No NaN in the tensors; of `count` processes the one with `index` looks at its share.

    Raises:
      InterchangeError: naming the first tensor with one.
    """
    mine = _share(source.tensors.values(), index, count)
    # Comparing lets go of the interpreter's lock; more threads than this only wait for memory.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for tensor, found in zip(mine, pool.map(lambda t: t.has_nan(), mine), strict=True):
            if found:
                raise InterchangeError(f"{_place(tensor)} holds a NaN")


def _share(tensors: Iterable[StoredTensor], index: int, count: int) -> list[StoredTensor]:
    # By size: the embedding of a small model is as large as all its layers.
    loads = [0] * count
    mine = []
    for tensor in sorted(tensors, key=lambda t: -t.nbytes):
        lightest = loads.index(min(loads))
        loads[lightest] += tensor.nbytes
        if lightest == index:
            mine.append(tensor)
    return mine


def _missing(source: Source, missing: list[str], extra: list[str]) -> str:
    stored = source.stored_name(missing[0])
    # Only what the model has no other use for can be this one under a wrong name.
    similar = nearest(stored, [source.tensors[name].stored_name for name in extra])
    others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
    hint = ""
    if missing == [LM_HEAD]:
        hint = "; the config doesn't say that the head is tied to the embedding"
    return f"{source.path}: tensor {stored} is missing{others}{hint}{_only_close(similar)}"


def _extra(source: Source, tensor: StoredTensor, wanted: list[str]) -> str:
    names = [source.stored_name(name) for name in wanted]
    similar = _only_close(nearest(tensor.stored_name, names))
    if tensor.stored_name not in names and tensor.name != tensor.stored_name:
        # A name of some Llama, such as a bias or a further layer: no other name was meant.
        similar = ""
    return f"{_place(tensor)} has no place in the model that the config describes{similar}"


def _only_close(suggestion: str) -> str:
    return suggestion if "did you mean" in suggestion else ""


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise InterchangeError(
            f"{_place(tensor)} has shape {list(tensor.shape)}; the config asks for {list(shape)}"
        )


def _check_equal(head: StoredTensor, embedding: StoredTensor) -> None:
    for part in pieces(head.shape, head.dtype.itemsize):
        if not np.array_equal(head.read(part), embedding.read(part), equal_nan=True):
            raise InterchangeError(
                f"{_place(head)} differs from {embedding.stored_name}, though the config says "
                "that the two are tied; set tie_word_embeddings to false, or remove the tensor"
            )


def _place(tensor: StoredTensor) -> str:
    return f"{tensor.file}: tensor {tensor.stored_name}"
