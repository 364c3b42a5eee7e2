"""JSON lines that grow one whole record at a time, and go on after a kill at any moment.

The first line is a header: what the records were made from and how. A file with another header
isn't gone on with. Each record has a number under `prompt`, and stands once.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_jax.synthesis.prompts import SynthesisError

KEY = "prompt"


class Journal:
    """A file opened for going on; a half-written last line is cut off, everything else is kept.

    Args:
      path: made where it isn't there.
      header: JSON values; those of the file must be the same.

    Raises:
      SynthesisError: another header, a line that is no record, or one that writes to it already.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.header = path, json.loads(json.dumps(dict(header)))
        self._file = path.open("ab+")
        try:
            self._lock()
            self.records = self._resume()
        except BaseException:
            self._file.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is on the disk when this returns.

        Raises:
          SynthesisError: there is one of this number.
        """
        number = record[KEY]
        if number in self.records:
            raise SynthesisError(f"{self.path}: prompt {number} is there already")
        self._write(record)
        self.records[number] = json.loads(json.dumps(dict(record)))

    def __contains__(self, number: int) -> bool:
        return number in self.records

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SynthesisError(f"{self.path}: another process is writing to it") from None

    def _resume(self) -> dict[int, dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            # What a kill left of a line; it is made again.
            self._file.truncate(whole)
        header, records = _parse(content[:whole], self.path)
        if header is None:
            self._write(self.header)
        else:
            _check_same(header, self.header, self.path)
        return records

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(dict(record), ensure_ascii=False, allow_nan=False) + "\n"
        self._file.write(line.encode("utf-8", "surrogatepass"))
        self._file.flush()
        os.fsync(self._file.fileno())


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records, by number; what follows the last whole line is left out.

    Raises:
      SynthesisError: absent or empty, or a line that is no record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SynthesisError(f"{path}: {error.strerror or error}") from None
    header, records = _parse(content[: content.rfind(b"\n") + 1], path)
    if header is None:
        raise SynthesisError(f"{path}: nothing in it")
    return header, [records[number] for number in sorted(records)]


def write_lines(path: Path, records: Iterator[Mapping[str, Any]]) -> int:
    """A file of JSON lines in one piece: the old file is there, or all of the new one.

    Returns:
      How many lines it has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    count = 0
    with temporary.open("wb") as file:
        for record in records:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
            file.write(line.encode("utf-8", "surrogatepass"))
            count += 1
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return count


def _parse(content: bytes, path: Path) -> tuple[dict[str, Any] | None, dict[int, dict[str, Any]]]:
    header, records = None, {}
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        record = _loaded(line, f"{path}:{number}")
        if header is None:
            header = record
        elif not isinstance(record.get(KEY), int) or record[KEY] in records:
            raise SynthesisError(f"{path}:{number}: not a record of its own prompt")
        else:
            records[record[KEY]] = record
    return header, records


def _loaded(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8", "surrogatepass"))
    except ValueError:
        raise SynthesisError(f"{where}: not a whole JSON object") from None
    if not isinstance(record, dict):
        raise SynthesisError(f"{where}: not a JSON object")
    return record


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    for place in _differences(old, new, ""):
        raise SynthesisError(
            f"{path}: was begun with another {place}; remove the file to begin anew, or write "
            "elsewhere"
        )


def _differences(old: Any, new: Any, place: str) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from _differences(old.get(key), new.get(key), f"{place}.{key}".lstrip("."))
    elif old != new:
        yield f"{place} ({_shown(old)}, now {_shown(new)})"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
