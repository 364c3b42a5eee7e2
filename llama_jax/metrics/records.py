"""`metrics.jsonl`: one JSON object a line, in order of steps, no step twice whatever happened.

A line is `{"step": ..., "loss": ..., "tokens": ..., ...}` for a step and
`{"step": ..., "held_out": {...}}` for an evaluation after that step.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from llama_jax.config.run_files import write_text

Record = dict[str, Any]


class RecordWriter:
    """Appends records; what an interrupted run wrote past the restored step is dropped first.

    Args:
      path: the file. Object stores can't append, so there the whole file is written at `flush`.
      from_step: the restored step; lines of later steps and a half-written last line go.
    """

    def __init__(self, path: epath.PathLike, from_step: int) -> None:
        self._path = epath.Path(path)
        kept = [record for record in read_records(self._path) if record["step"] <= from_step]
        self._text = "".join(_line(record) for record in kept)
        write_text(self._path, self._text)
        local = "://" not in str(path)
        self._file = self._path.open("a", encoding="utf-8") if local else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one record of `step`."""
        line = _line({"step": step, **values})
        if self._file is None:
            self._text += line
        else:
            self._file.write(line)

    def flush(self) -> None:
        """Make what was written visible to other readers."""
        if self._file is None:
            write_text(self._path, self._text)
        else:
            self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        if self._file is not None:
            self._file.close()


def read_records(path: epath.PathLike) -> list[Record]:
    """All whole records of a file, none when it is absent; a half-written last line is left out.

    Raises:
      ValueError: a broken line that is not the last, which no interruption explains.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: {error}") from None
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    # NaN and Infinity aren't JSON: as strings they stay readable, and every parser takes them.
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
