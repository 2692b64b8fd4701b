"""Records as lines of JSON: to be read by programs, and complete up to the last line after any crash."""

from __future__ import annotations

import json
import time

from weightflip.records import AlertEvent, FlipRecord, RunInfo
from weightflip.sinks.background import BackgroundSink
from weightflip.sinks.files import AppendedFile, writer_id


class JSONLSink(BackgroundSink):
    """Appends one JSON object a line: ``{"info": {...}}`` first, then ``{"record": {...}}`` and ``{"alert": {...}}``.

    Each line ends with ``"writer"``, a name that each opening of the file has anew, and ``"time"``, in seconds since
    1970. A resumed run appends to the same file; lines of steps after the checkpoint stand there twice, the later one
    counts. Two trainings at once are told apart by their writers.

    Args:
        path: The file; its directory is made when the first record comes.

    Raises:
        OSError: The file cannot be written.
    """

    _separators = (", ", ": ")

    def __init__(self, path: str) -> None:
        self._file = AppendedFile(path)
        self._writer = ""
        self._info = ""

    @property
    def place(self) -> str:
        """Where it writes; no two sinks of a run have the same."""
        return self._file.place

    def start(self, info: RunInfo, first_step: int) -> None:
        if not self._file.is_open:
            self._file.open()
            self._writer = writer_id()
            if self._file.is_torn:
                self._file.append("\n")
        self._info = self._as_line({"info": info.to_dict(), "first_step": first_step})
        self._file.append(self._info)

    def write(self, record: FlipRecord) -> None:
        self._line({"record": self._contents(record)})

    def alert(self, event: AlertEvent) -> None:
        self._line({"alert": vars(event)})

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _contents(self, record: FlipRecord) -> dict[str, object]:
        return record.to_dict()

    def _line(self, data: dict[str, object]) -> None:
        self._file.append(self._as_line(data), heading=self._info)

    def _as_line(self, data: dict[str, object]) -> str:
        data = {**data, "writer": self._writer, "time": round(time.time(), 3)}
        return json.dumps(data, separators=self._separators) + "\n"
