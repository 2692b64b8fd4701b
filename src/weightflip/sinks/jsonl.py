"""Records as JSON Lines, for programs. After a crash, the file is complete up to the last line."""

from __future__ import annotations

import json
import time

from weightflip.records import AlertEvent, FlipRecord, RunInfo
from weightflip.sinks.background import BackgroundSink
from weightflip.sinks.files import AppendedFile, writer_id


class JSONLSink(BackgroundSink):
    """Appends one JSON object per line: first ``{"info": {...}}``, then ``{"record": {...}}`` and ``{"alert": {...}}``.

    Each line ends with ``"writer"``, a unique name for each time that the file is opened, and ``"time"``, in seconds
    since 1970. A resumed run appends to the same file. Lines of steps after the checkpoint then occur twice; the later
    ones are valid. ``"writer"`` separates two runs that write at the same time.

    Args:
        path: The file. Its directory is created at the first record.

    Raises:
        OSError: The file is not writable.
    """

    _separators = (", ", ": ")

    def __init__(self, path: str) -> None:
        self._file = AppendedFile(path)
        self._writer = ""
        self._info = ""

    @property
    def destination(self) -> str:
        """The resolved path of the file. No two sinks of a run may share it."""
        return self._file.destination

    def start(self, info: RunInfo, first_step: int) -> None:
        if not self._file.is_open:
            self._file.open()
            self._writer = writer_id()
            if self._file.has_partial_line:
                self._file.append("\n")
        self._info = self._encode_line({"info": info.to_dict(), "first_step": first_step})
        self._file.append(self._info)

    def write(self, record: FlipRecord) -> None:
        self._append_line({"record": self._encode_record(record)})

    def alert(self, event: AlertEvent) -> None:
        self._append_line({"alert": vars(event)})

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _encode_record(self, record: FlipRecord) -> dict[str, object]:
        return record.to_dict()

    def _append_line(self, data: dict[str, object]) -> None:
        self._file.append(self._encode_line(data), heading=self._info)

    def _encode_line(self, data: dict[str, object]) -> str:
        data = {**data, "writer": self._writer, "time": round(time.time(), 3)}
        return json.dumps(data, separators=self._separators) + "\n"
