"""Records as lines of JSON: to be read by programs, and complete up to the last line after any crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

from weightflip.records import FlipRecord, RunInfo
from weightflip.sinks.files import check_writable


class JSONLSink:
    """Appends one JSON object a line: ``{"info": {...}}`` first, then ``{"record": {...}}``.

    A resumed run appends to the same file; lines of steps after the checkpoint stand there twice, the later one counts.

    Args:
        path: The file; its directory is made when the first record comes.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        check_writable(self.path.parent, "the directory of " + str(path))
        if self.path.exists():
            with self.path.open("a"):
                pass
        self._file: TextIO | None = None

    def start(self, info: RunInfo, first_step: int) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            if self._is_torn():
                self._file.write("\n")
        self._line({"info": {**vars(info), "notes": list(info.notes)}, "first_step": first_step})

    def write(self, record: FlipRecord) -> None:
        self._line({"record": record.to_dict()})

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_torn(self) -> bool:
        """Whether an earlier run was killed in the middle of a line."""
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"

    def _line(self, data: dict[str, object]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(data) + "\n")
        self._file.flush()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}
