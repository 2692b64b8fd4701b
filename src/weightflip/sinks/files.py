"""Finding out early that a place cannot be written."""

from __future__ import annotations

import tempfile
from pathlib import Path


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
