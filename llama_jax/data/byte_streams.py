"""The bytes of a source's files: opened anywhere fsspec reaches, decompressed, cut into lines."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal, Protocol

from llama_jax.data.files import SourceFile

CHUNK_BYTES = 1 << 20


class CompressionError(Exception):
    """Compressed data that ends early or is damaged; all that could be had came before."""

    def __init__(self, reason: Literal["truncated_file", "damaged_file"], detail: str) -> None:
        super().__init__(detail)
        self.reason: Literal["truncated_file", "damaged_file"] = reason
        self.detail = detail


def kind_of(name: str) -> tuple[str, str]:
    """The suffix that says how a file is read (none: as one text), and that of its compression."""
    compression = next((end for end in (".gz", ".zst") if name.endswith(end)), "")
    bare = name.removesuffix(compression)
    return next(
        (end for end in (".jsonl", ".parquet", ".json") if bare.endswith(end)), ""
    ), compression


def open_file(file: SourceFile) -> Any:
    """A context that gives the file's bytes as a stream."""
    import fsspec

    return fsspec.open(file.url, "rb")


def chunks_of(stream: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """The stream in parts; `on_bytes` is told the size of each."""
    while chunk := stream.read(CHUNK_BYTES):
        on_bytes(len(chunk))
        yield chunk


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def decompress(chunks: Iterator[bytes], compression: str) -> Iterator[bytes]:
    """Plain bytes of gzip or zstd, both of which may be several streams one after the other.

    Raises:
      CompressionError: after the last bytes that could be had.
    """
    if not compression:
        yield from chunks
        return
    make, failure, padding = _decompressor(compression)
    stream: _Decompressor | None = None
    for chunk in chunks:
        while chunk:
            if stream is None:
                chunk = chunk.lstrip(padding) if padding else chunk
                stream = make() if chunk else None
                continue
            try:
                plain = stream.decompress(chunk)
            except failure as error:
                raise CompressionError("damaged_file", str(error)) from None
            if plain:
                yield plain
            chunk = stream.unused_data if stream.eof else b""
            stream = None if stream.eof else stream
    if stream is not None:
        raise CompressionError("truncated_file", "compressed data ends early")


def _decompressor(
    compression: str,
) -> tuple[Callable[[], _Decompressor], type[Exception], bytes]:
    if compression == ".gz":
        # 31: the largest window, gzip headers. gzip streams may be padded with zeros.
        return (lambda: zlib.decompressobj(31)), zlib.error, b"\0"
    import zstandard

    # The largest window that `zstd --long=31` writes.
    context = zstandard.ZstdDecompressor(max_window_size=2**31)
    return context.decompressobj, zstandard.ZstdError, b""


def lines_of(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends; the last may lack one."""
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        for other in others:
            yield b"".join(rest)
            rest = [other]
    last = b"".join(rest)
    if last:
        yield last
