"""Records of a source's files: JSON objects line by line, in a list, or rows of Parquet.

What can't be read is a `Problem` in its place, as for text.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llama_jax.config.run import TextConfig
from llama_jax.data.byte_streams import (
    CompressionError,
    chunks_of,
    decompress,
    kind_of,
    lines_of,
    open_file,
)
from llama_jax.data.files import SourceFile, list_files
from llama_jax.data.reading import Problem, decode_document, parse_object, type_name

SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst"),
    *(".json", ".json.gz", ".json.zst"),
    ".parquet",
)
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Record(NamedTuple):
    """A record's fields and where it stood: line, item of a list or row of Parquet, from 1."""

    file: str
    line: int
    fields: dict[str, Any]


Records = Iterator[Record | Problem]


def record_files(path: str) -> list[SourceFile]:
    """The files of a source of records, in the order of their names.

    Raises:
      ConfigError: none at this path.
    """
    return list_files(TextConfig(path=path, suffixes=SUFFIXES))


def read_records(file: SourceFile, on_bytes: Callable[[int], None]) -> Records:
    """The records and problems of a file, in its order.

    Args:
      file: read by its suffix, one of `SUFFIXES`.
      on_bytes: told about bytes read from the file, for progress.
    """
    kind, compression = kind_of(file.name)
    if not kind:
        yield Problem(file.name, None, "unreadable_file", f"not one of {' '.join(SUFFIXES)}")
        return
    try:
        with open_file(file) as stream:
            if kind == ".parquet":
                yield from _read_rows(file, stream)
                on_bytes(file.size)
                return
            chunks = decompress(chunks_of(stream, on_bytes), compression)
            if kind == ".json":
                yield from _read_json(file.name, chunks)
            else:
                yield from _read_lines(file.name, chunks)
    except OSError as error:
        yield Problem(file.name, None, "unreadable_file", error.strerror or str(error))


def _read_lines(name: str, chunks: Iterator[bytes]) -> Records:
    number = 0
    try:
        for number, line in enumerate(lines_of(chunks), 1):
            yield _record_of_line(name, number, line)
    except CompressionError as error:
        yield Problem(name, number + 1, error.reason, error.detail)
        return
    if not number:
        yield Problem(name, None, "empty_document", "no line")


def _record_of_line(name: str, number: int, line: bytes) -> Record | Problem:
    decoded = decode_document(name, number, line)
    if isinstance(decoded, Problem):
        return decoded
    fields = parse_object(decoded)
    if isinstance(fields, Problem):
        return fields
    # JSON can spell halves of characters, which aren't Unicode text.
    if _LONE_SURROGATE.search(decoded.text) and not _is_unicode(fields):
        return Problem(name, number, "broken_utf8", "a lone surrogate")
    return Record(name, number, _that_are_set(fields))


def _that_are_set(fields: dict[str, Any]) -> dict[str, Any]:
    """A table written out as JSON has every column in each record: null where there is nothing."""
    return {name: value for name, value in fields.items() if value is not None}


def _is_unicode(fields: Any) -> bool:
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_json(name: str, chunks: Iterator[bytes]) -> Records:
    """A list of objects; a file that holds none is read as JSON lines."""
    try:
        data = b"".join(chunks)
    except CompressionError as error:
        yield Problem(name, None, error.reason, error.detail)
        return
    if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_lines(name, iter([data]))
        return
    try:
        items = json.loads(data)
    except (ValueError, RecursionError) as error:
        yield Problem(name, None, "bad_json", str(error))
        return
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            detail = f"not an object but {type_name(item)}"
            yield Problem(name, number, "wrong_type", detail)
        elif not _is_unicode(item):
            yield Problem(name, number, "broken_utf8", "a lone surrogate")
        else:
            yield Record(name, number, _that_are_set(item))
    if not items:
        yield Problem(name, None, "empty_document", "an empty list")


def _read_rows(file: SourceFile, stream: Any) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        for batch in map(_with_times_as_text, pq.ParquetFile(stream).iter_batches(1024)):
            for i in range(batch.num_rows):
                row += 1
                yield _record_of_row(file.name, row, batch.slice(i, 1))
    except pa.ArrowException as error:
        detail = str(error).splitlines()[0]
        yield Problem(file.name, row + 1 if row else None, "unreadable_file", detail)
        return
    if not row:
        yield Problem(file.name, None, "empty_document", "no row")


def _with_times_as_text(batch: Any) -> Any:
    """As JSON has them; Python has no type for all of them, nanoseconds for one."""
    import pyarrow as pa

    for place, column in enumerate(batch.columns):
        if pa.types.is_timestamp(column.type) or pa.types.is_time(column.type):
            batch = batch.set_column(place, batch.schema.names[place], column.cast(pa.string()))
    return batch


def _record_of_row(name: str, row: int, table: Any) -> Record | Problem:
    try:
        (fields,) = table.to_pylist()
    except UnicodeDecodeError as error:
        return Problem(name, row, "broken_utf8", f"byte {error.start}: {error.reason}")
    except (ValueError, OverflowError) as error:  # times inside of others
        return Problem(name, row, "wrong_type", str(error).partition(". ")[0])
    return Record(name, row, _without_nulls(fields))


def _without_nulls(value: Any) -> Any:
    """Every row of Parquet has all fields of its column's type: those not set are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
