"""Files and directories that are written completely, or not at all."""

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
    """See that a file may be written.

    Raises:
        DeltaError: It is there and ``force`` is False, or it is a directory, or its directory is missing.
    """
    if path.is_dir():
        raise DeltaError(f"{printable(str(path))} is a directory; expected the name of a file to write")
    if not path.parent.is_dir():
        raise DeltaError(f"the directory {printable(str(path.parent))} is not there; make it first")
    if path.exists() and not force:
        raise DeltaError(f"{printable(str(path))} is there already; choose another name, or say --force (force=True)")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` that takes its name when the block ends, and is removed where it raises."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            _settle(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory beside ``path``, which must be free or empty, that takes its name when the block ends."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as temporary:
        inner = Path(temporary, "new")
        # Not the mode of a temporary directory, which is for its owner alone.
        inner.mkdir()
        yield inner
        os.replace(inner, path)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file of such a directory."""
    with open(path, "xb") as file:
        yield file
        _settle(file)


def _settle(file: BinaryIO) -> None:
    """On the disk, and with the mode that any new file gets."""
    file.flush()
    if hasattr(os, "fchmod"):
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(file.fileno(), 0o666 & ~mask)
    os.fsync(file.fileno())
