"""JSONL files, during or after training, to :class:`Run`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from weightflip.records import RunInfo
from weightflip.report import legacy, lines
from weightflip.report.block import Block
from weightflip.report.points import Table
from weightflip.report.run import Alert, Run, chains_of, models_of, of_nonfinite, updated
from weightflip.report.scan import Line, Scan, Writer

# What a run of 10,000 points of 200 layers has forty times of; a view shows a few hundred points at most.
_BYTES_READ_AT_MOST = 24_000_000
_POINTS_READ_AT_LEAST = 200


def read(found: Scan, path: Path, every_record: bool) -> list[Run]:
    """One run; several where their writers were at work at once; none for files that are not ours.

    Args:
        found: What the files hold.
        path: What the runs are called by.
        every_record: Read all records; else as many as a report can show.
    """
    writers = list(found.writers.values())
    chains = chains_of([(writer.begin, writer.end) for writer in writers])
    with ExitStack() as stack:
        files = [stack.enter_context(file.open("rb")) for file in found.paths]
        runs = [
            run
            for chain in chains
            if (run := _Chain(files, found.damaged).read([writers[at] for at in chain], path, every_record)) is not None
        ]
    if len(runs) < 2:
        return runs
    where = "file" if len(found.paths) == 1 else "directory"
    note = (
        f"one of {len(runs)} trainings that wrote to this {where} at once, kept apart; give each a {where} of its own"
    )
    return [replace(run, path=path / f"writer {at}", notes=(*run.notes, note)) for at, run in enumerate(runs, 1)]


class _Chain:
    """Reads what writers wrote that follow each other: one training.

    Args:
        files: Those that were scanned, open.
        damaged: Lines that the scan could not read.
    """

    def __init__(self, files: Sequence[IO[bytes]], damaged: int) -> None:
        self._files = files
        self._damaged = damaged
        self._info = RunInfo({}, {})
        self._alerts: list[Alert] = []
        self._kept: list[Line] = []
        self._turns = 0

    def read(self, writers: Sequence[Writer], path: Path, every_record: bool) -> Run | None:
        """The training; None without a record."""
        self._follow(content for writer in writers for content in writer.contents)
        chosen = self._kept if every_record else _spread(self._kept)
        table = self._table(chosen)
        if not table:
            return None
        info = legacy.declared(self._info, table.gauges)
        layers = table.layers(info)
        return Run(
            path.name, path, info, layers, models_of(layers), tuple(self._alerts), self._notes(len(chosen), table)
        )

    def _follow(self, contents: Iterable[Line | RunInfo | Alert]) -> None:
        """What is left where steps were done again."""
        has_begun = False
        for content in contents:
            if isinstance(content, RunInfo):
                self._info = updated(self._info, content)
                has_begun = True
            elif isinstance(content, Alert):
                self._alerts.append(content)
            else:
                step = content.step
                if self._kept and self._kept[-1].step >= step:
                    if self._is_damaged(content):
                        # It must not stand in for whole lines.
                        self._damaged += 1
                        continue
                    self._turns += not has_begun
                    # A run that was resumed, or begun anew, does these steps again.
                    self._kept = [earlier for earlier in self._kept if earlier.step < step]
                    self._alerts = [alert for alert in self._alerts if alert.step < step]
                self._kept.append(content)
                has_begun = False

    def _table(self, chosen: Sequence[Line]) -> Table:
        """The points of some of the records; of a record that follows others left out, those of all of them."""
        table = Table()
        before: Block | None = None
        last = -1
        positions = {(line.file, line.offset): at for at, line in enumerate(self._kept)}
        for line in chosen:
            try:
                block = self._block(line)
            except lines.DamagedLine:
                self._damaged += 1
                continue
            at = positions[line.file, line.offset]
            table.add(line.step, block, before, widens=at > last + 1)
            before, last = block, at
        return table

    def _block(self, line: Line) -> Block:
        self._files[line.file].seek(line.offset)
        return lines.block_of(self._files[line.file].read(line.length), line.step)

    def _is_damaged(self, line: Line) -> bool:
        try:
            self._block(line)
        except lines.DamagedLine:
            return True
        return False

    def _notes(self, chosen: int, table: Table) -> tuple[str, ...]:
        notes = []
        if chosen < len(self._kept):
            notes.append(f"{len(self._kept):,} points, {chosen:,} of them read; the windows between are added up")
        if self._damaged:
            notes.append(
                f"{self._damaged:,} damaged line{'s' * (self._damaged > 1)} left out: torn, where the training was "
                "killed or is still writing, or changed afterwards"
            )
        if self._turns > 1:
            notes.append(
                f"steps go back {self._turns:,} times without a new beginning: two trainings wrote to this file at "
                "once, or one loaded checkpoints as often. Of each step the later point counts; give each training a "
                "file of its own"
            )
        if table.left_out:
            notes.append(of_nonfinite(table.left_out))
        return tuple(notes)


def _spread(every: Sequence[Line]) -> Sequence[Line]:
    size = sum(line.length for line in every)
    if size <= _BYTES_READ_AT_MOST:
        return every
    points = max(_POINTS_READ_AT_LEAST, len(every) * _BYTES_READ_AT_MOST // size)
    if points >= len(every):
        return every
    return [every[at] for at in np.unique(np.linspace(0, len(every) - 1, points).round().astype(int))]
