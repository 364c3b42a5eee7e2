"""Documents from one file: text, JSON lines, Parquet, plain or compressed.

What can't be read is a `Problem` with a reason, file and line, in the place where the document
would have been; the rest of the file is still read where that is possible.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple

from llama_jax.data.byte_streams import (
    CompressionError,
    chunks_of,
    decompress,
    kind_of,
    lines_of,
    open_file,
)
from llama_jax.data.files import SourceFile

Reason = Literal[
    "unreadable_file",  # it can't be opened or read, or isn't the format that its suffix says
    "truncated_file",  # compressed data ends early; what stood before is kept
    "damaged_file",  # compressed data that can't be decompressed; what stood before is kept
    "broken_utf8",  # not valid Unicode, lone surrogates in JSON included
    "empty_document",  # nothing but white space
    "bad_json",
    "missing_field",
    "wrong_type",  # the record is no object, or its text field no string
    # Of conversations and preferences; see `records`.
    "unknown_form",  # none of the forms that are read
    "bad_message",  # a role, field or order that messages can't have
    "empty_message",  # a message without text or calls
    "no_answer",  # nothing that an assistant wrote
    "bad_ranking",  # a ranking or strength that doesn't fit the responses
    "empty_response",
    "identical_responses",
    "too_many_responses",  # more responses or pairs than a row has room for
    "inexpressible",  # the chat format can't write it
    "too_long",  # for a row, whatever turns are dropped
    "not_edited",  # a preference without the edited response that was asked for
    "other_strength",  # a preference not as strong as those asked for
    "no_pair",  # a response that stands alone, where the loss is of pairs
    "undesirable",  # an answer that is labelled so, where answers are learned
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


def is_records(file: SourceFile) -> bool:
    """Whether the file holds many documents, or is one."""
    return kind_of(file.name)[0] in (".jsonl", ".parquet")


def read_file(file: SourceFile, text_field: str, on_bytes: Callable[[int], None]) -> Read:
    """The documents and problems of a file, in its order.

    Args:
      file: read by its suffix: `.jsonl` and `.parquet` hold records, anything else is one text;
        `.gz` and `.zst` after that are decompressed.
      text_field: the field of records that holds the text.
      on_bytes: told about bytes read from the file, for progress.
    """
    kind, compression = kind_of(file.name)
    try:
        with open_file(file) as stream:
            if kind == ".parquet":
                yield from _read_parquet(file, stream, text_field)
                on_bytes(file.size)
                return
            chunks = decompress(chunks_of(stream, on_bytes), compression)
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
        with open_file(file) as stream:
            for chunk in chunks_of(stream, lambda _: None):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def _read_text(name: str, chunks: Iterable[bytes]) -> Document | Problem:
    try:
        return decode_document(name, None, b"".join(chunks))
    except CompressionError as error:
        return Problem(name, None, error.reason, error.detail)


def decode_document(name: str, line: int | None, data: bytes) -> Document | Problem:
    """The text of these bytes, or what is wrong with it."""
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
        for number, line in enumerate(lines_of(chunks), 1):
            yield _jsondecode_document(name, number, line, text_field)
    except CompressionError as error:
        yield Problem(name, number + 1, error.reason, error.detail)
        return
    if not number:
        yield Problem(name, None, "empty_document", "no line")


def _jsondecode_document(
    name: str, number: int, line: bytes, text_field: str
) -> Document | Problem:
    decoded = decode_document(name, number, line)
    if isinstance(decoded, Problem):
        return decoded
    record = parse_object(decoded)
    if isinstance(record, Problem):
        return record
    if text_field not in record:
        return Problem(name, number, "missing_field", f"no '{text_field}'")
    text = record[text_field]
    if not isinstance(text, str):
        return Problem(name, number, "wrong_type", f"'{text_field}' is {type_name(text)}")
    return decode_document(name, number, text.encode("utf-8", "surrogatepass"))


def parse_object(line: Document) -> dict[str, Any] | Problem:
    """The JSON object that a line holds."""
    try:
        record = json.loads(line.text)
    except json.JSONDecodeError as error:
        return Problem(line.file, line.line, "bad_json", f"column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return Problem(line.file, line.line, "bad_json", str(error))
    if not isinstance(record, dict):
        detail = f"not an object but {type_name(record)}"
        return Problem(line.file, line.line, "wrong_type", detail)
    return record


def type_name(value: object) -> str:
    """What a JSON value is, in words."""
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
                yield _parquetdecode_document(file.name, row, value, text_field)
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


def _parquetdecode_document(
    name: str, row: int, value: object, text_field: str
) -> Document | Problem:
    if not isinstance(value, bytes):
        return Problem(name, row, "wrong_type", f"'{text_field}' is {type_name(value)}")
    return decode_document(name, row, value)
