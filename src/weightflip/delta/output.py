"""Files and directories that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from weightflip.delta.errors import DeltaError
from weightflip.records import printable


def check_free(path: Path, force: bool) -> None:
    """Check that a file may be written.

    Raises:
        DeltaError: It exists and ``force`` is False, it is a directory, or its directory does not exist.
    """
    if path.is_dir():
        raise DeltaError(f"expected the name of a file to write, got the directory {printable(str(path))}; name a file")
    if not path.parent.is_dir():
        raise DeltaError(f"the directory {printable(str(path.parent))} does not exist; create it first")
    if path.exists() and not force:
        raise DeltaError(f"{printable(str(path))} already exists; choose another name, or pass --force (force=True)")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file next to ``path`` that is renamed to it at the end of the block, or removed after an error."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            _finish_file(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that is renamed to ``path`` at the end. ``path`` must be empty or not exist."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as temporary:
        inner = Path(temporary, "new")
        # A temporary directory itself is accessible to its owner only.
        inner.mkdir()
        yield inner
        os.replace(inner, path)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A new file in such a directory."""
    with open(path, "xb") as file:
        yield file
        _finish_file(file)


def _finish_file(file: BinaryIO) -> None:
    """Flush to disk, and set the default mode of new files."""
    file.flush()
    if hasattr(os, "fchmod"):
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(file.fileno(), 0o666 & ~mask)
    os.fsync(file.fileno())
