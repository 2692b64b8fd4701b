"""Finds and reads the runs below given paths."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from weightflip.report import events, jsonl
from weightflip.report.run import NoRecords, ReportError, Run
from weightflip.report.scan import Scan, scan

# JSONL file next to an event file: flips, time, host, process, number.
_REPORT_FILE = re.compile(r"flips\.\d+\..*\.\d+\.\d+\.jsonl")
# Maximum seconds between a point in the event file and the same point in its JSONL file.
_SLACK = 5.0


def read_runs(
    paths: Sequence[str | os.PathLike[str]],
    every_record: bool = False,
    progress: Callable[[float], object] = lambda size: None,
) -> list[Run]:
    """Read all runs below some paths.

    Args:
        paths: Run directories, directories that contain runs at any depth, ``.jsonl`` files, or event files.
        every_record: Read every record of a long JSONL file. By default, at most as many evenly spaced records are read
            as a report can show. The windows in between are summed, so that no count is lost.
        progress: Called with the number of bytes processed since the last call. They add up to about
            :func:`total_size`.

    Returns:
        At least one run. In a directory with both kinds of files, JSONL is read, since event files hold only ratios.

    Raises:
        ReportError: A path does not exist or has no records.
    """
    runs: list[Run] = []
    read_paths: set[Path] = set()
    for path in (Path(path) for path in paths):
        found = list(_read_below(path, every_record, progress))
        if not found:
            raise NoRecords(
                f"{path}: no weightflip records. Expected .jsonl files with records or event files (*tfevents*) with "
                "flip_rate/... tags, here or in any subdirectory. A training writes its first point after log_every= "
                "steps"
            )
        runs += [run for run in found if run.path.resolve() not in read_paths]
        read_paths.update(run.path.resolve() for run in found)
    names = _short_names([run.path for run in runs])
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _short_names(paths: Sequence[Path]) -> list[str]:
    absolute = [path.resolve() for path in paths]
    if len(absolute) == 1:
        return [absolute[0].name]
    common = Path(os.path.commonpath(absolute))
    return [str(path.relative_to(common)) if path != common else path.name for path in absolute]


def _read_below(path: Path, every_record: bool, progress: Callable[[float], object]) -> Iterator[Run]:
    if not path.exists():
        raise NoRecords(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix != ".jsonl" and "tfevents" not in path.name:
            raise ReportError(f"{path}: expected a directory, a .jsonl file or an event file (*tfevents*)")
        if path.suffix == ".jsonl":
            yield from jsonl.read(scan([path], progress), path, every_record, progress)
        else:
            yield from events.read(path, progress)
        return
    for directory, below, names in os.walk(path):
        below.sort()
        yield from _read_directory(Path(directory), sorted(names), every_record, progress)


def _read_directory(
    path: Path, names: Sequence[str], every_record: bool, progress: Callable[[float], object]
) -> list[Run]:
    """Read the files of one directory: JSONL files from ``sinks=``, or else the output of a run with TensorBoard."""
    files, report_files = _split_jsonl(path, names)
    runs = [run for file in files for run in jsonl.read(scan([file], progress), file, every_record, progress)]
    if len(runs) == 1:
        return [replace(runs[0], path=path)]
    if runs:
        return runs
    if report_files:
        found = scan(report_files, progress)
        if _covers_event_files(found, path):
            runs = jsonl.read(found, path, every_record, progress)
    if not runs and any("tfevents" in name for name in names):
        runs = events.read(path, progress)
        if report_files:
            note = "read from event files, which hold only ratios: the JSONL files next to them lack some points"
            runs = [replace(run, notes=(*run.notes, note)) for run in runs]
    return runs


def _split_jsonl(path: Path, names: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """JSONL files from ``sinks=``, and those written next to event files."""
    files = [path / name for name in names if name.endswith(".jsonl") and not _REPORT_FILE.fullmatch(name)]
    return files, [path / name for name in names if _REPORT_FILE.fullmatch(name)]


def list_files(path: Path) -> list[Path]:
    """The files to read below a path, judged by their names."""
    if path.is_file():
        return [path]
    found = []
    for directory, _, names in os.walk(path):
        files, report_files = _split_jsonl(Path(directory), names)
        found += files or report_files or [Path(directory, name) for name in names if "tfevents" in name]
    return found


def total_size(paths: Sequence[str | os.PathLike[str]]) -> int:
    """Number of bytes to read."""
    return sum(file.stat().st_size for path in paths for file in list_files(Path(path)) if file.is_file())


def _covers_event_files(found: Scan, path: Path) -> bool:
    """Whether JSONL files cover all points of the event files next to them.

    They do not if an earlier version started the run, or if the disk was full when the JSONL was written.
    """
    spans = [span for file in path.glob("*tfevents*") if file.is_file() and (span := events.find_span(file))]
    return all(found.first_step <= span.first_step and span.end <= found.last_time + _SLACK for span in spans)
