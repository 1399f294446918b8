"""The rows of a run as an event file of TensorBoard.

`tensorboardX.SummaryWriter` has a thread that dies on a full disk and then blocks training.
"""

import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from mpl_fast.training.metrics import Row


class Board:
    """Writes in the calling thread, so that it raises what fails."""

    def __init__(self, folder: Path, step: int) -> None:
        """A new file, for whose sake points of other files from `step` on are not shown."""
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        self._write(step, session_log=SessionLog(status=SessionLog.START))

    def row(self, step: int, values: Row) -> None:
        """A point of each curve."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=Summary(value=points))

    def flush(self) -> None:
        """Writes what is buffered."""
        self._file.flush()

    def close(self) -> None:
        """Writes what is buffered and closes the file."""
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(Event(wall_time=time.time(), step=step, **content))
