"""A training as it goes on: its files are read again when they have changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from weightflip.report.read import files_of, read_runs
from weightflip.report.run import NoRecords, Run

# Seconds between two looks, and how many times as long as the reading took.
_PAUSE, _PAUSE_FACTOR = 2.0, 5.0


def follow(
    paths: Sequence[str], pause: float = _PAUSE, sleep: Callable[[float], object] = time.sleep
) -> Iterator[list[Run]]:
    """The runs below some paths, and again each time that something was added to their files. It does not end.

    Args:
        paths: As of :func:`weightflip.report.read.read_runs`.
        pause: Seconds from one look to the next; longer where the reading takes long, so that the training has the
            processor.
        sleep: Waits for some seconds.

    Yields:
        The runs; none as long as there is no record.

    Raises:
        ReportError: A path to what is no record.
    """
    before: object = None
    while True:
        now = _state(paths)
        took = 0.0
        if now != before:
            before = now
            begin = time.monotonic()
            try:
                runs = read_runs(paths)
            except NoRecords:
                # A run that has only just begun, or has not.
                runs = []
            took = time.monotonic() - begin
            yield runs
        sleep(max(pause, _PAUSE_FACTOR * took))


def _state(paths: Sequence[str]) -> list[tuple[Path, int, int]]:
    """Names, sizes and times of all files."""
    found = []
    for file in (file for path in paths if Path(path).exists() for file in files_of(Path(path))):
        try:
            state = file.stat()
        except OSError:
            # Gone between the two looks.
            continue
        found.append((file, state.st_size, state.st_mtime_ns))
    return found
