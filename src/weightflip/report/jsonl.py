"""JSONL files, during or after training, to :class:`Run`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from weightflip.records import LayerRecord, RunInfo, split_variant
from weightflip.report import legacy, lines
from weightflip.report.run import Alert, Layer, Run, Series, chains_of, gauges_of, models_of, of_nonfinite, updated

# What a run of 10,000 points of 200 layers has forty times of; a view shows a few hundred points at most.
_BYTES_READ_AT_MOST = 24_000_000
_POINTS_READ_AT_LEAST = 200
_RECORD = re.compile(rb'\s*\{\s*"record"\s*:\s*\{\s*"step"\s*:\s*(\d{1,18})\s*,')
# At the end of a line, which it closes.
_WRITER = re.compile(rb'"writer"\s*:\s*"([^"\\]{1,300})"\s*,\s*"time"\s*:\s*(\d{1,15}(?:\.\d{0,9})?)\s*\}\s*$')
_WRITER_ROOM = 400


class _Line(NamedTuple):
    """Where the record of a step is."""

    step: int
    file: int
    offset: int
    length: int


@dataclass
class _Writer:
    """What one opening of a file has written, in order."""

    begin: float
    end: float
    contents: list[_Line | RunInfo | Alert] = field(default_factory=list)


@dataclass
class Scan:
    """What some files hold, before their records are read.

    Attributes:
        paths: The files.
        writers: By name; what earlier versions wrote has none.
        damaged: Lines that cannot be read.
        last_time: Of the last line, in seconds; 0 where no line says.
    """

    paths: Sequence[Path]
    writers: dict[bytes, _Writer] = field(default_factory=dict)
    damaged: int = 0
    last_time: float = 0.0

    @property
    def first_step(self) -> float:
        """The lowest step of a record; infinite without one."""
        contents = (content for writer in self.writers.values() for content in writer.contents)
        return min((content.step for content in contents if isinstance(content, _Line)), default=math.inf)


def scan(paths: Sequence[Path]) -> Scan:
    """Look through one file, or through those of one directory that are one training, resumed or not."""
    found = Scan(paths)
    for at, path in enumerate(paths):
        writer = b""
        with path.open("rb") as file:
            offset = 0
            for line in file:
                named = _WRITER.search(line[-_WRITER_ROOM:])
                match = _RECORD.match(line)
                content: _Line | RunInfo | Alert | None = None
                if match:
                    content = _Line(int(match[1]), at, offset, len(line))
                elif line.strip():
                    try:
                        content = _content(lines.parse(line))
                    except lines.DamagedLine:
                        found.damaged += 1
                # One begins with what it tracks. The name in another line, if it is no one's, is damaged.
                if named and (named[1] in found.writers or isinstance(content, RunInfo)):
                    writer = named[1]
                time = float(named[2]) if named else 0.0
                if content is not None:
                    found.last_time = max(found.last_time, time)
                # Several files are in the order of their times; lines of one file in their own.
                now = float(offset) if len(paths) == 1 else time
                if content is not None:
                    of = found.writers.setdefault(writer, _Writer(now, now))
                    of.contents.append(content)
                    of.end = max(of.end, now)
                offset += len(line)
    return found


def _content(data: Mapping[str, Any]) -> RunInfo | Alert | None:
    if "info" in data:
        return lines.info_of(data["info"])
    if "alert" in data:
        return _alert_from_dict(data["alert"])
    if "record" in data:
        raise lines.DamagedLine
    return None


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
            if (run := _Chain(files).read([writers[at] for at in chain], path, every_record, found.damaged)) is not None
        ]
    if len(runs) < 2:
        return runs
    where = "file" if len(found.paths) == 1 else "directory"
    note = (
        f"one of {len(runs)} trainings that wrote to this {where} at once, kept apart; give each a {where} of its own"
    )
    return [replace(run, path=path / f"writer {at}", notes=(*run.notes, note)) for at, run in enumerate(runs, 1)]


class _Chain:
    """Reads what writers wrote that follow each other: one training."""

    def __init__(self, files: Sequence[IO[bytes]]) -> None:
        self._files = files

    def _bytes(self, line: _Line) -> bytes:
        self._files[line.file].seek(line.offset)
        return self._files[line.file].read(line.length)

    def read(self, writers: Sequence[_Writer], path: Path, every_record: bool, damaged: int) -> Run | None:
        kept: list[_Line] = []
        info = RunInfo({}, {})
        alerts: list[Alert] = []
        turns = 0
        has_begun = False
        for content in (content for writer in writers for content in writer.contents):
            if isinstance(content, RunInfo):
                info = updated(info, content)
                has_begun = True
            elif isinstance(content, Alert):
                alerts.append(content)
            else:
                step = content.step
                if kept and kept[-1].step >= step:
                    if _is_damaged(self._bytes(content), step):
                        # It must not stand in for whole lines.
                        damaged += 1
                        continue
                    turns += not has_begun
                    # A run that was resumed, or begun anew, does these steps again.
                    kept = [earlier for earlier in kept if earlier.step < step]
                    alerts = [alert for alert in alerts if alert.step < step]
                kept.append(content)
                has_begun = False
        chosen = kept if every_record else _spread(kept)
        notes = []
        if len(chosen) < len(kept):
            notes.append(f"{len(kept):,} points, {len(chosen):,} of them read; the windows between are added up")
        table = _Table()
        before: dict[str, LayerRecord] = {}
        last = -1
        positions = {(line.file, line.offset): at for at, line in enumerate(kept)}
        for line in chosen:
            try:
                record = lines.record_of(self._bytes(line), line.step)
            except lines.DamagedLine:
                damaged += 1
                continue
            at = positions[line.file, line.offset]
            for layer in record.layers:
                table.add(record.step, _widened(layer, before.get(layer.name)) if at > last + 1 else layer)
            before = {layer.name: layer for layer in record.layers}
            last = at
        if not before:
            return None
        if damaged:
            notes.append(
                f"{damaged:,} damaged line{'s' * (damaged > 1)} left out: torn, where the training was killed or is "
                "still writing, or changed afterwards"
            )
        if turns > 1:
            notes.append(
                f"steps go back {turns:,} times without a new beginning: two trainings wrote to this file at once, or "
                "one loaded checkpoints as often. Of each step the later point counts; give each training a file of "
                "its own"
            )
        if table.left_out:
            notes.append(of_nonfinite(table.left_out))
        info = legacy.declared(info, table.gauges)
        layers = table.layers(info)
        return Run(path.name, path, info, layers, models_of(layers), tuple(alerts), tuple(notes))


def _is_damaged(line: bytes, step: int) -> bool:
    try:
        lines.record_of(line, step)
    except lines.DamagedLine:
        return True
    return False


def _spread(every: Sequence[_Line]) -> Sequence[_Line]:
    size = sum(line.length for line in every)
    if size <= _BYTES_READ_AT_MOST:
        return every
    points = max(_POINTS_READ_AT_LEAST, len(every) * _BYTES_READ_AT_MOST // size)
    if points >= len(every):
        return every
    return [every[at] for at in np.unique(np.linspace(0, len(every) - 1, points).round().astype(int))]


def _widened(layer: LayerRecord, before: LayerRecord | None) -> LayerRecord:
    """With the window since an earlier record than the last one, where counting was not begun anew in between."""
    window = layer.total - before.total if before is not None else layer.total
    counted = [number for name, number in vars(window).items() if name != "ratios"]
    return layer if min(counted) < 0 else replace(layer, window=window)


def _alert_from_dict(data: Any) -> Alert:
    if not isinstance(data, dict):
        raise lines.DamagedLine
    step, *words = (data.get(name, "") for name in Alert._fields)
    step = step or 0
    if type(step) is not int or not 0 <= step < 2**63:
        raise lines.DamagedLine
    return Alert(step, *(str(word) for word in words))


@dataclass
class _Table:
    """Collects points, layer by layer and value by value."""

    points: dict[str, dict[str, list[tuple[float, float, float]]]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    gauges: dict[str, None] = field(default_factory=dict)
    left_out: int = 0

    def add(self, step: int, layer: LayerRecord) -> None:
        rows = self.points.setdefault(layer.name, {})
        self.weights[layer.name] = layer.weights
        self.gauges.update(dict.fromkeys(layer.gauges))
        for name, quotient in layer.quotients.items():
            if all(map(math.isfinite, (*quotient, quotient.value))):
                rows.setdefault(name, []).append((step, *quotient))
            else:
                self.left_out += 1
        if layer.nonfinite:
            rows.setdefault("nonfinite_weights", []).append((step, layer.nonfinite, 1))

    def layers(self, info: RunInfo) -> dict[str, Layer]:
        found = {}
        gauges = gauges_of(info)
        for name, rows in self.points.items():
            _, dtype, quantizer = info.tracked.get(name, ("", "", split_variant(name)[1]))
            values = {value: _series(points, value in gauges) for value, points in rows.items()}
            found[name] = Layer(name, self.weights[name], dtype, quantizer, values)
        return found


def _series(points: Sequence[tuple[float, float, float]], gauge: bool) -> Series:
    steps, numerators, denominators = np.array(points, dtype=np.float64).reshape(-1, 3).T
    return Series(steps.astype(np.int64), numerators, denominators, gauge)
