"""Output that goes to files: can it be written, and what an earlier run left there."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import TextIO

_writers = itertools.count()


def writer_id() -> str:
    """A name that no other writer has, made as those of event files are: time, host, process, number in it."""
    return f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_writers)}"


def check_writable(directory: Path, what: str) -> None:
    """Raise unless files can be made in ``directory``, or it can be made; leaves no trace.

    Raises:
        OSError: With what was tried, and what to do.
    """
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            f"{what} cannot be written: making a file in {str(existing)!r} failed with {error.strerror or error}; "
            "choose another place, or sinks=[] to keep the numbers and write nothing"
        ) from error


class AppendedFile:
    """A text file that sinks append to: opened when the first record comes, on disk after each.

    Args:
        path: Its directory is made when it is opened.

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

    @property
    def is_open(self) -> bool:
        return self._file is not None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever written; also of what is no plain file."""
        return not self.path.is_file() or self.path.stat().st_size == 0

    def open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def append(self, text: str) -> None:
        assert self._file is not None
        self._file.write(text)
        self._file.flush()

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def whole_lines(self) -> int:
        """Bytes up to the end of the last whole line: less than the file's, if a run was killed in a line."""
        if self.is_empty:
            return 0
        with self.path.open("rb") as file:
            end = file.seek(0, 2)
            while end:
                start = max(0, end - 65536)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                if found >= 0:
                    return start + found + 1
                end = start
        return 0

    @property
    def is_torn(self) -> bool:
        """Whether an earlier run was killed in the middle of a line."""
        return not self.is_empty and self.whole_lines() < self.path.stat().st_size

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}
