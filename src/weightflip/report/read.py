"""Paths to runs: which files of a directory are read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from weightflip.report import events, jsonl
from weightflip.report.run import ReportError, Run
from weightflip.report.scan import Scan, scan

# Beside an event file: flips, time, host, process, number.
_BESIDE = re.compile(r"flips\.\d+\..*\.\d+\.\d+\.jsonl")
# Seconds from a point in the event file to the same one in the file beside it.
_SLACK = 5.0


def read_runs(paths: Sequence[str | os.PathLike[str]], every_record: bool = False) -> list[Run]:
    """Every run below some paths.

    Args:
        paths: Run directories, directories with runs somewhere below, ``.jsonl`` files, event files.
        every_record: Read each record of a long JSONL file. Else as many as a report can show, evenly spread: the
            windows between them are added up, so that no count is lost.

    Returns:
        At least one run. In a directory with both, JSONL is read: it has the counts, event files have quotients.

    Raises:
        ReportError: A path that is not there, or has no records.
    """
    runs: list[Run] = []
    seen: set[Path] = set()
    for path in (Path(path) for path in paths):
        found = list(_read_below(path, every_record))
        if not found:
            raise ReportError(
                f"{path}: no records of weightflip. Looked for .jsonl files with records and for event files "
                "(*tfevents*) with flip_rate/... tags, here and in all directories below. A training writes its first "
                "point after log_every= steps"
            )
        runs += [run for run in found if run.path.resolve() not in seen]
        seen.update(run.path.resolve() for run in found)
    names = _short_names([run.path for run in runs])
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _short_names(paths: Sequence[Path]) -> list[str]:
    absolute = [path.resolve() for path in paths]
    if len(absolute) == 1:
        return [absolute[0].name]
    common = Path(os.path.commonpath(absolute))
    return [str(path.relative_to(common)) if path != common else path.name for path in absolute]


def _read_below(path: Path, every_record: bool) -> Iterator[Run]:
    if not path.exists():
        raise ReportError(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix != ".jsonl" and "tfevents" not in path.name:
            raise ReportError(f"{path}: neither a .jsonl file nor an event file (*tfevents*) nor a directory")
        if path.suffix == ".jsonl":
            yield from jsonl.read(scan([path]), path, every_record)
        else:
            yield from events.read(path)
        return
    for directory, below, names in os.walk(path):
        below.sort()
        yield from _read_directory(Path(directory), sorted(names), every_record)


def _read_directory(path: Path, names: Sequence[str], every_record: bool) -> list[Run]:
    """The files of a directory: JSONL that somebody asked for, or else what a run with TensorBoard has written."""
    files = [path / name for name in names if name.endswith(".jsonl") and not _BESIDE.fullmatch(name)]
    runs = [run for file in files for run in jsonl.read(scan([file]), file, every_record)]
    if len(runs) == 1:
        return [replace(runs[0], path=path)]
    if runs:
        return runs
    if beside := [path / name for name in names if _BESIDE.fullmatch(name)]:
        found = scan(beside)
        if _is_whole(found, path):
            runs = jsonl.read(found, path, every_record)
    if not runs and any("tfevents" in name for name in names):
        runs = events.read(path)
        if beside:
            note = "read from event files, which hold quotients: the JSONL beside them does not have all points"
            runs = [replace(run, notes=(*run.notes, note)) for run in runs]
    return runs


def _is_whole(found: Scan, path: Path) -> bool:
    """Whether the event files of a directory have no points before or after those of the files beside them.

    They do where an earlier version began the run, or where the disk was full when the JSONL was written.
    """
    spans = [span for file in path.glob("*tfevents*") if file.is_file() and (span := events.span(file))]
    return all(found.first_step <= span.first_step and span.end <= found.last_time + _SLACK for span in spans)
