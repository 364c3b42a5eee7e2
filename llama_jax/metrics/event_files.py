"""TensorBoard event files, written with TensorBoard's own record and proto code.

Neither TensorFlow nor torch is imported: TensorBoard's `Writer` would load TensorFlow wherever it
is installed, for a few hundred bytes a step.
"""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from etils import epath


class EventFileWriter:
    """Scalars by step into a new event file in `directory`.

    Args:
      directory: created when absent.
      from_step: the restored step. TensorBoard drops the points of an interrupted run
        past it, as this file begins by saying that the session restarts there.
    """

    def __init__(self, directory: epath.PathLike, from_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer import record_writer

        # Their messages are made when they are imported, so type checkers know none of them.
        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self._tensor: Any = tensor_pb2
        self._types: Any = types_pb2
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        # The name is what TensorBoard looks for; nanoseconds keep two runs in a second apart.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = record_writer.RecordWriter((folder / name).open("wb"))
        self._write(self._event.Event(wall_time=time.time(), file_version="brain.Event:2"))
        restart = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(
            self._event.Event(wall_time=time.time(), step=from_step + 1, session_log=restart)
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the scalars of one step; a `/` in a name groups them on the page."""
        values = [
            self._summary.Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
        ]
        summary = self._summary.Summary(value=values)
        self._write(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def write_text(self, step: int, tag: str, text: str) -> None:
        """Add a text, shown on TensorBoard's text page."""
        kind = self._types.DT_STRING
        tensor = self._tensor.TensorProto(dtype=kind, string_val=[text.encode()])
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        metadata = self._summary.SummaryMetadata(plugin_data=plugin)
        value = self._summary.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
        summary = self._summary.Summary(value=[value])
        self._write(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Make what was written visible to TensorBoard."""
        self._records.flush()

    def close(self) -> None:
        """Flush and close."""
        self._records.flush()
        self._records.close()

    def _write(self, event: object) -> None:
        self._records.write(event.SerializeToString())  # type: ignore[attr-defined]
