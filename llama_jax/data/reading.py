"""Documents from one file: text, JSON lines, Parquet, plain or compressed.

What can't be read is a `Problem` with a reason, file and line, in the place where the document
would have been; the rest of the file is still read where that is possible.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

from llama_jax.data.files import SourceFile

CHUNK_BYTES = 1 << 20

Reason = Literal[
    "unreadable_file",  # it can't be opened or read, or isn't the format that its suffix says
    "truncated_file",  # compressed data ends early; what stood before is kept
    "damaged_file",  # compressed data that can't be decompressed; what stood before is kept
    "broken_utf8",  # not valid Unicode, lone surrogates in JSON included
    "empty_document",  # nothing but white space
    "bad_json",
    "missing_field",
    "wrong_type",  # the record is no object, or its text field no string
]


class Document(NamedTuple):
    """A text and where it stood; `line` counts from 1, rows in Parquet, and is None for a file."""

    file: str
    line: int | None
    text: str


class Problem(NamedTuple):
    """Something that is no document, and why."""

    file: str
    line: int | None
    reason: Reason
    detail: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.reason.replace('_', ' ')}" + (self.detail and f" ({self.detail})")


Read = Iterator[Document | Problem]


class _CompressionError(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail


def is_records(file: SourceFile) -> bool:
    """Whether the file holds many documents, or is one."""
    return _kind(file.name)[0] in (".jsonl", ".parquet")


def read_file(file: SourceFile, text_field: str, on_bytes: Callable[[int], None]) -> Read:
    """The documents and problems of a file, in its order.

    Args:
      file: read by its suffix: `.jsonl` and `.parquet` hold records, anything else is one text;
        `.gz` and `.zst` after that are decompressed.
      text_field: the field of records that holds the text.
      on_bytes: told about bytes read from the file, for progress.
    """
    kind, compression = _kind(file.name)
    try:
        with _open(file) as stream:
            if kind == ".parquet":
                yield from _read_parquet(file, stream, text_field)
                on_bytes(file.size)
                return
            chunks = _decompress(_chunks(stream, on_bytes), compression)
            if kind == ".jsonl":
                yield from _read_json_lines(file.name, chunks, text_field)
            else:
                yield _read_text(file.name, chunks)
    except OSError as error:
        yield Problem(file.name, None, "unreadable_file", error.strerror or str(error))


def sha256_of(file: SourceFile) -> str | None:
    """The hash of the file's bytes as they stand on disk; None where it can't be read."""
    digest = hashlib.sha256()
    try:
        with _open(file) as stream:
            for chunk in _chunks(stream, lambda _: None):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def _kind(name: str) -> tuple[str, str]:
    compression = next((end for end in (".gz", ".zst") if name.endswith(end)), "")
    bare = name.removesuffix(compression)
    return next((end for end in (".jsonl", ".parquet") if bare.endswith(end)), ""), compression


def _open(file: SourceFile) -> Any:
    import fsspec

    return fsspec.open(file.url, "rb")


def _chunks(stream: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK_BYTES):
        on_bytes(len(chunk))
        yield chunk


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _decompress(chunks: Iterator[bytes], compression: str) -> Iterator[bytes]:
    """Plain bytes of gzip or zstd, both of which may be several streams one after the other.

    Raises:
      _CompressionError: after the last bytes that could be had.
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
                raise _CompressionError("damaged_file", str(error)) from None
            if plain:
                yield plain
            chunk = stream.unused_data if stream.eof else b""
            stream = None if stream.eof else stream
    if stream is not None:
        raise _CompressionError("truncated_file", "compressed data ends early")


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


def _read_text(name: str, chunks: Iterable[bytes]) -> Document | Problem:
    try:
        return _document(name, None, b"".join(chunks))
    except _CompressionError as error:
        return Problem(name, None, error.reason, error.detail)


def _document(name: str, line: int | None, data: bytes) -> Document | Problem:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Problem(name, line, "broken_utf8", f"byte {error.start}: {error.reason}")
    if not text.strip():
        return Problem(name, line, "empty_document", "")
    return Document(name, line, text)


def _read_json_lines(name: str, chunks: Iterator[bytes], text_field: str) -> Read:
    number = 0
    try:
        for number, line in enumerate(_lines(chunks), 1):
            yield _json_document(name, number, line, text_field)
    except _CompressionError as error:
        yield Problem(name, number + 1, error.reason, error.detail)
        return
    if not number:
        yield Problem(name, None, "empty_document", "no line")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
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


def _json_document(name: str, number: int, line: bytes, text_field: str) -> Document | Problem:
    decoded = _document(name, number, line)
    if isinstance(decoded, Problem):
        return decoded
    try:
        record = json.loads(decoded.text)
    except json.JSONDecodeError as error:
        return Problem(name, number, "bad_json", f"column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return Problem(name, number, "bad_json", str(error))
    if not isinstance(record, dict):
        return Problem(name, number, "wrong_type", f"not an object but {_type_name(record)}")
    if text_field not in record:
        return Problem(name, number, "missing_field", f"no '{text_field}'")
    text = record[text_field]
    if not isinstance(text, str):
        return Problem(name, number, "wrong_type", f"'{text_field}' is {_type_name(text)}")
    return _document(name, number, text.encode("utf-8", "surrogatepass"))


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _read_parquet(file: SourceFile, stream: BinaryIO, text_field: str) -> Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        table = pq.ParquetFile(stream)
        if text_field not in table.schema_arrow.names:
            yield Problem(file.name, None, "missing_field", f"no column '{text_field}'")
            return
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for value in _column_bytes(batch.column(0)):
                row += 1
                yield _parquet_document(file.name, row, value, text_field)
    except pa.ArrowException as error:
        detail = str(error).splitlines()[0]
        yield Problem(file.name, row + 1 if row else None, "unreadable_file", detail)
        return
    if not row:
        yield Problem(file.name, None, "empty_document", "no row")


def _column_bytes(column: Any) -> Iterator[object]:
    """Strings as bytes, so that broken UTF-8 is found a row at a time; other values as they are."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    yield from (column.cast(pa.large_binary()) if text else column).to_pylist()


def _parquet_document(name: str, row: int, value: object, text_field: str) -> Document | Problem:
    if not isinstance(value, bytes):
        return Problem(name, row, "wrong_type", f"'{text_field}' is {_type_name(value)}")
    return _document(name, row, value)
