"""Reads JSONL files into :class:`Run` objects, during or after training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from weightflip.records import RunInfo
from weightflip.report import legacy, lines
from weightflip.report.points import PointTable
from weightflip.report.record_arrays import RecordArrays
from weightflip.report.run import Alert, Run, group_into_chains, merge_info, nonfinite_note, sum_models
from weightflip.report.scan import Line, Scan, Writer

# A run of 10,000 points of 200 layers has forty times as many. A report shows at most a few hundred points.
_MAX_BYTES_READ = 24_000_000
_MIN_POINTS_READ = 200


def read(
    found: Scan, path: Path, every_record: bool, progress: Callable[[float], object] = lambda size: None
) -> list[Run]:
    """Read one run, several runs if they wrote at the same time, or none if the files contain no records.

    Args:
        found: Scan of the files.
        path: Path that names the runs.
        every_record: Read all records instead of as many as a report can show.
        progress: Called with numbers of bytes that add up to half the size of the files.
    """
    writers = list(found.writers.values())
    chains = group_into_chains([(writer.begin, writer.end) for writer in writers])
    with ExitStack() as stack:
        files = [stack.enter_context(file.open("rb")) for file in found.paths]
        read = [
            _Chain(files, found.damaged, progress).read([writers[at] for at in chain], path, every_record)
            for chain in chains
        ]
        runs = [run for run in read if run is not None]
    if len(runs) < 2:
        return runs
    where = "file" if len(found.paths) == 1 else "directory"
    note = f"one of {len(runs)} trainings that wrote to this {where} at the same time; give each its own {where}"
    return [replace(run, path=path / f"writer {at}", notes=(*run.notes, note)) for at, run in enumerate(runs, 1)]


class _Chain:
    """Reads the output of consecutive writers, which form one training.

    Args:
        files: The scanned files, opened.
        damaged: Number of lines that the scan could not read.
        progress: Called with half the size of each record, whether it is read or skipped.
    """

    def __init__(self, files: Sequence[IO[bytes]], damaged: int, progress: Callable[[float], object]) -> None:
        self._files = files
        self._progress = progress
        self._damaged = damaged
        self._info = RunInfo({}, {})
        self._alerts: list[Alert] = []
        self._kept: list[Line] = []
        self._steps_back = 0

    def read(self, writers: Sequence[Writer], path: Path, every_record: bool) -> Run | None:
        """Read the training; None without records."""
        self._drop_repeated_steps(content for writer in writers for content in writer.contents)
        chosen = self._kept if every_record else _thin_out(self._kept)
        table = self._collect_points(chosen)
        if not table:
            return None
        info = legacy.add_legacy_values(self._info, table.gauges)
        layers = table.layers(info)
        return Run(
            path.name, path, info, layers, sum_models(layers), tuple(self._alerts), self._make_notes(len(chosen), table)
        )

    def _drop_repeated_steps(self, contents: Iterable[Line | RunInfo | Alert]) -> None:
        """Collect infos, alerts and records. Records of steps that were repeated later are dropped."""
        has_new_info = False
        for content in contents:
            if isinstance(content, RunInfo):
                self._info = merge_info(self._info, content)
                has_new_info = True
            elif isinstance(content, Alert):
                self._alerts.append(content)
            else:
                step = content.step
                if self._kept and self._kept[-1].step >= step:
                    if self._is_damaged(content):
                        # A damaged line must not replace valid ones.
                        self._damaged += 1
                        continue
                    self._steps_back += not has_new_info
                    # The run was resumed or restarted and repeats these steps.
                    self._kept = [earlier for earlier in self._kept if earlier.step < step]
                    self._alerts = [alert for alert in self._alerts if alert.step < step]
                self._kept.append(content)
                has_new_info = False

    def _collect_points(self, chosen: Sequence[Line]) -> PointTable:
        """The points of the chosen records. A record after skipped ones gets the window of all of them."""
        table = PointTable()
        before: RecordArrays | None = None
        last = -1
        positions = {(line.file, line.offset): at for at, line in enumerate(self._kept)}
        fraction = sum(line.length for line in self._kept) / 2 / max(1, len(chosen))
        for line in chosen:
            self._progress(fraction)
            try:
                arrays = self._read_record(line)
            except lines.DamagedLine:
                self._damaged += 1
                continue
            at = positions[line.file, line.offset]
            table.add(line.step, arrays, before, widens=at > last + 1)
            before, last = arrays, at
        return table

    def _read_record(self, line: Line) -> RecordArrays:
        self._files[line.file].seek(line.offset)
        return lines.parse_record(self._files[line.file].read(line.length), line.step)

    def _is_damaged(self, line: Line) -> bool:
        try:
            self._read_record(line)
        except lines.DamagedLine:
            return True
        return False

    def _make_notes(self, chosen: int, table: PointTable) -> tuple[str, ...]:
        notes = []
        if chosen < len(self._kept):
            notes.append(f"{chosen:,} of {len(self._kept):,} points read; the windows in between are summed")
        if self._damaged:
            notes.append(
                f"{self._damaged:,} damaged line{'s' * (self._damaged > 1)} skipped: incomplete, because the training "
                "was killed or is still writing, or modified afterward"
            )
        if self._steps_back > 1:
            notes.append(
                f"steps go back {self._steps_back:,} times without a restart: two trainings wrote to this file at the "
                "same time, or one loaded checkpoints that often. The later point of each step is used; give each "
                "training its own file"
            )
        if table.left_out:
            notes.append(nonfinite_note(table.left_out))
        return tuple(notes)


def _thin_out(kept: Sequence[Line]) -> Sequence[Line]:
    size = sum(line.length for line in kept)
    if size <= _MAX_BYTES_READ:
        return kept
    points = max(_MIN_POINTS_READ, len(kept) * _MAX_BYTES_READ // size)
    if points >= len(kept):
        return kept
    return [kept[at] for at in np.unique(np.linspace(0, len(kept) - 1, points).round().astype(int))]
