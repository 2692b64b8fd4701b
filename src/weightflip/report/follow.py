"""Follows a running training: reads its files again when they change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from weightflip.report.read import list_files, read_runs
from weightflip.report.run import NoRecords, Run

# Minimum seconds between two checks, and minimum multiple of the time that reading takes.
_PAUSE, _PAUSE_FACTOR = 2.0, 5.0


def follow(
    paths: Sequence[str], pause: float = _PAUSE, sleep: Callable[[float], object] = time.sleep
) -> Iterator[list[Run]]:
    """Yield the runs below some paths, and again each time their files change. Never ends.

    Args:
        paths: As in :func:`weightflip.report.read.read_runs`.
        pause: Seconds between two checks. Longer if reading takes long, so that the training keeps the CPU.
        sleep: Function that waits for a number of seconds.

    Yields:
        The runs; an empty list while there are no records.

    Raises:
        ReportError: A path is neither a directory nor a readable file.
    """
    before: object = None
    while True:
        now = _file_states(paths)
        took = 0.0
        if now != before:
            before = now
            begin = time.monotonic()
            try:
                runs = read_runs(paths)
            except NoRecords:
                # The run has just started, or not yet.
                runs = []
            took = time.monotonic() - begin
            yield runs
        sleep(max(pause, _PAUSE_FACTOR * took))


def _file_states(paths: Sequence[str]) -> list[tuple[Path, int, int]]:
    """Paths, sizes and modification times of all files."""
    states = []
    for file in (file for path in paths if Path(path).exists() for file in list_files(Path(path))):
        try:
            state = file.stat()
        except OSError:
            # Deleted after it was listed.
            continue
        states.append((file, state.st_size, state.st_mtime_ns))
    return states
