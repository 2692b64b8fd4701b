"""Output that goes to files: can it be written, and what an earlier run left there."""

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


def warn_of_deletion(place: Path) -> None:
    """Say that output went on in a new file."""
    warn(
        f"weightflip: {str(place)!r} was deleted or moved while it was written to; what was in it is not written "
        "again, and records go on in a new file there",
        stacklevel=3,
    )


class AppendedFile:
    """A text file that sinks append to: opened when the first record comes, on disk after each.

    Args:
        path: Its directory is made when it is opened.
        tells: Whether it warns where it was deleted.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: str, *, tells: bool = True) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise IsADirectoryError(
                f"{path!r} in sinks= is a directory; name a file in it, such as "
                f"{str(self.path / ('flips' + self.path.suffix))!r}, or give log_dir= for TensorBoard's files"
            )
        check_writable(self.path.parent, "the directory of " + str(path))
        if self.path.exists():
            with self.path.open("a"):
                pass
        self._at = self.path
        self._has_told = not tells
        self._file: TextIO | None = None

    @property
    def is_open(self) -> bool:
        return self._file is not None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever written; also of what is no plain file."""
        return not self.path.is_file() or self.path.stat().st_size == 0

    def open(self) -> None:
        # Wherever the script goes then.
        self._at = self.path.absolute()
        self._at.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._at.open("a", encoding="utf-8", newline="\n")

    @property
    def place(self) -> str:
        """Where it is, links followed: the same for all ways to write the path."""
        return os.path.realpath(self.path)

    def append(self, text: str, heading: str = "") -> None:
        """Write to the end, and have it on disk.

        A file that was deleted or moved since it was opened is made anew, which is warned about once: what is written
        to the old one reaches nobody. One that was emptied, as log rotation does it, begins with its heading again.

        Args:
            text: Whole lines.
            heading: What a new file begins with.

        Raises:
            OSError: It cannot be written, or not be made anew.
        """
        assert self._file is not None
        is_gone = self._is_gone()
        if is_gone:
            self._file.close()
            self._at.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._at.open("a", encoding="utf-8", newline="\n")
        if self._is_emptied():
            text = heading + text
        self._file.write(text)
        self._file.flush()
        if is_gone and not self._has_told:
            self._has_told = True
            # After the record: a warning may be an error.
            warn_of_deletion(self._at)

    def _is_gone(self) -> bool:
        assert self._file is not None
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), self._at.stat())
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False

    def _is_emptied(self) -> bool:
        assert self._file is not None
        status = os.fstat(self._file.fileno())
        # Of a pipe the size is always 0.
        return stat.S_ISREG(status.st_mode) and status.st_size == 0

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
