"""Output files: checks that they are writable, and appends after interrupted runs and deletion."""

from __future__ import annotations

import itertools
import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import TextIO

from weightflip.sinks.background import warn

_writers = itertools.count()


def writer_id() -> str:
    """A unique writer name, built like the names of event files: time, host, process, number within the process."""
    return f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_writers)}"


def check_writable(directory: Path, what: str) -> None:
    """Raise unless files can be created in ``directory``, which need not exist. Leaves no files behind.

    Raises:
        OSError: The directory is not writable. The error says what was tried and what to do.
    """
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            f"{what} is not writable: creating a file in {str(existing)!r} failed with {error.strerror or error}; "
            "choose another directory, or pass sinks=[] to keep the numbers and write nothing"
        ) from error


def warn_of_deletion(path: Path) -> None:
    """Warn that output continues in a new file."""
    warn(
        f"weightflip: {str(path)!r} was deleted or moved during the run; records continue in a new file there, and "
        "earlier records are not written again",
        stacklevel=3,
    )


class AppendedFile:
    """A text file for appending. It is opened at the first record and flushed to disk after each record.

    Args:
        path: The file. Its directory is created when it is opened.
        warns_of_deletion: Whether to warn if the file is deleted while open.

    Raises:
        OSError: The file is not writable.
    """

    def __init__(self, path: str, *, warns_of_deletion: bool = True) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise IsADirectoryError(
                f"expected a file in sinks=, got the directory {path!r}; name a file in it, such as "
                f"{str(self.path / ('flips' + self.path.suffix))!r}, or use log_dir= for TensorBoard's files"
            )
        check_writable(self.path.parent, "the directory of " + str(path))
        if self.path.exists():
            with self.path.open("a"):
                pass
        self._absolute_path = self.path
        self._should_warn = warns_of_deletion
        self._file: TextIO | None = None

    @property
    def is_open(self) -> bool:
        return self._file is not None

    @property
    def is_empty(self) -> bool:
        """Whether the file is empty, missing, or not a regular file."""
        return not self.path.is_file() or self.path.stat().st_size == 0

    def open(self) -> None:
        # Absolute, in case the script changes the working directory.
        self._absolute_path = self.path.absolute()
        self._absolute_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._absolute_path.open("a", encoding="utf-8", newline="\n")

    @property
    def destination(self) -> str:
        """The path with symbolic links resolved, so that all spellings of a path are equal."""
        return os.path.realpath(self.path)

    def append(self, text: str, heading: str = "") -> None:
        """Append text and flush it to disk.

        If the file was deleted or moved since it was opened, it is created again, with one warning: nobody would see
        output in the old file. If the file was truncated, for example by log rotation, it starts with its heading
        again.

        Args:
            text: Complete lines.
            heading: First line of a new file.

        Raises:
            OSError: The file cannot be written or created again.
        """
        assert self._file is not None
        is_deleted = self._is_deleted()
        if is_deleted:
            self._file.close()
            self._absolute_path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._absolute_path.open("a", encoding="utf-8", newline="\n")
        if self._is_truncated():
            text = heading + text
        self._file.write(text)
        self._file.flush()
        if is_deleted and self._should_warn:
            self._should_warn = False
            # After the record is written, since warnings may be turned into errors.
            warn_of_deletion(self._absolute_path)

    def _is_deleted(self) -> bool:
        assert self._file is not None
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), self._absolute_path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False

    def _is_truncated(self) -> bool:
        assert self._file is not None
        status = os.fstat(self._file.fileno())
        # The size of a pipe is always 0.
        return stat.S_ISREG(status.st_mode) and status.st_size == 0

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def complete_lines_nbytes(self) -> int:
        """Size in bytes of the complete lines. Less than the file size if a run was killed while writing a line."""
        if self.is_empty:
            return 0
        with self.path.open("rb") as file:
            end = file.seek(0, 2)
            while end:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    return start + newline + 1
                end = start
        return 0

    @property
    def has_partial_line(self) -> bool:
        """Whether the last line is incomplete, since an earlier run was killed."""
        return not self.is_empty and self.complete_lines_nbytes() < self.path.stat().st_size

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}
