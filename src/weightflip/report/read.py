"""Event files and JSONL, during or after training, to :class:`Run`: what every view of a report is made from."""

from __future__ import annotations

import itertools
import logging
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from weightflip.records import CORE_VALUES, MODEL_TAGS, LayerRecord, RunInfo, split_variant
from weightflip.report import legacy
from weightflip.report import lines as jsonl

# What a run of 10,000 points of 200 layers has forty times of; a view shows a few hundred points at most.
_BYTES_READ_AT_MOST = 24_000_000
_POINTS_READ_AT_LEAST = 200
_RECORD = re.compile(rb'\s*\{\s*"record"\s*:\s*\{\s*"step"\s*:\s*(\d{1,18})\s*,')
_MODEL_VALUES = {tag.removeprefix("flips/"): name for name, tag in MODEL_TAGS.items()}


class ReportError(Exception):
    """What a person can put right: a path without records, a package that is missing."""


@dataclass(frozen=True, eq=False)
class Series:
    """One number over time.

    Attributes:
        steps: Optimizer steps, ascending, one for each logging point: int64, (points,).
        numerators: What was counted, float64, (points,).
        denominators: What it was counted of; of event files, which hold quotients only, an estimate that is
            proportional to it where each step counts the same.
        gauge: A number of one moment; else one of the window since the point before.
    """

    steps: NDArray[np.int64]
    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]
    gauge: bool = False

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def values(self) -> NDArray[np.float64]:
        """(points,)."""
        return self.numerators / self.denominators

    @property
    def summary(self) -> float:
        """Of a gauge its last value, else the quotient of the sums; NaN where there is nothing."""
        if not len(self):
            return math.nan
        with np.errstate(all="ignore"):
            number = float(self.values[-1] if self.gauge else self.numerators.sum() / self.denominators.sum())
        return number if math.isfinite(number) else math.nan

    def part(self, after: float, to: float = math.inf) -> Series:
        """The points of the steps in (after, to]."""
        kept = (self.steps > after) & (self.steps <= to)
        return Series(self.steps[kept], self.numerators[kept], self.denominators[kept], self.gauge)


EMPTY = Series(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))


def total(series: Iterable[Series]) -> Series:
    """Of several layers: numerators and denominators are summed at each step, then divided."""
    parts = [one for one in series if len(one)]
    if not parts:
        return EMPTY
    steps, at = np.unique(np.concatenate([part.steps for part in parts]), return_inverse=True)
    numerators, denominators = (
        np.bincount(at, np.concatenate([getattr(part, name) for part in parts]), len(steps)).astype(np.float64)
        for name in ("numerators", "denominators")
    )
    return Series(steps, numerators, denominators, parts[0].gauge)


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight, as one quantizer sees it.

    Attributes:
        name: As in the records: ``weight@quantizer`` where there are several quantizers.
        weights: Number of weights; 0 where it is not known.
        dtype: Of the parameter; empty where it is not known.
        quantizer: Its name; empty where it is not known.
        values: Every number of it, by name.
    """

    name: str
    weights: int
    dtype: str
    quantizer: str
    values: Mapping[str, Series]

    @property
    def weight(self) -> str:
        """The parameter's name."""
        return split_variant(self.name)[0]

    @property
    def variant(self) -> str:
        """The quantizer where there are several, else empty."""
        return split_variant(self.name)[1]

    @property
    def is_stored(self) -> bool:
        """Whether a code is the weight as stored, so that a stalled update is lost."""
        return self.quantizer == "native" or (bool(self.quantizer) and self.quantizer == self.dtype)

    @property
    def grid(self) -> str:
        """The numbers that the codes stand for."""
        return self.dtype if self.is_stored else self.quantizer

    def get(self, value: str) -> Series:
        """A number over time; without points where it was not recorded."""
        return self.values.get(value, EMPTY)


class Alert(NamedTuple):
    """What a rule said during training."""

    step: int
    layer: str
    rule: str
    message: str


@dataclass(frozen=True, eq=False)
class Run:
    """One training.

    Attributes:
        name: Its path, as short as tells the runs of a report apart.
        path: Where it was read; with ``writer 1``, ``writer 2``, ... below it where several wrote at once.
        info: What is tracked and how; without rows where the files do not say.
        layers: By name, in the order of the records.
        models: Numbers of all layers together, by name, for each quantizer; the key is empty where there is but one.
        alerts: In the order in which they came.
        notes: What to know about the reading.
    """

    name: str
    path: Path
    info: RunInfo
    layers: Mapping[str, Layer]
    models: Mapping[str, Mapping[str, Series]]
    alerts: tuple[Alert, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """Of all logging points."""
        everything = [layer.get("flip_rate").steps for layer in self.layers.values()]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *everything]))

    @property
    def begin(self) -> int:
        """The step before the first window, as far as the distance of the points tells."""
        steps = self.steps
        return max(0, int(2 * steps[0] - steps[1])) if len(steps) > 1 else 0

    @property
    def end(self) -> int:
        """The step of the last point."""
        steps = self.steps
        return int(steps[-1]) if len(steps) else 0

    @property
    def late(self) -> float:
        """The step after which the last quarter begins."""
        return self.end - (self.end - self.begin) / 4


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
            run = _read_jsonl(path, every_record)
            yield from [] if run is None else [run]
        else:
            yield from _read_events(path)
        return
    for directory, below, files in os.walk(path):
        below.sort()
        jsonl = [Path(directory, file) for file in sorted(files) if file.endswith(".jsonl")]
        runs = [run for file in jsonl if (run := _read_jsonl(file, every_record)) is not None]
        if len(runs) == 1:
            runs = [replace(runs[0], path=Path(directory))]
        if not runs and any("tfevents" in file for file in files):
            runs = _read_events(Path(directory))
        yield from runs


# ---------------------------------------------------------------------- JSONL


class _Line(NamedTuple):
    step: int
    offset: int
    length: int


def _read_jsonl(path: Path, every_record: bool) -> Run | None:
    """None for a file that is not ours."""
    lines: list[_Line] = []
    info = RunInfo({}, {})
    alerts: list[Alert] = []
    damaged = turns = 0
    has_begun = False
    with path.open("rb") as file:
        offset = 0
        for line in file:
            match = _RECORD.match(line)
            if match:
                step = int(match[1])
                if lines and lines[-1].step >= step:
                    if _is_damaged(line, step):
                        # It must not stand in for whole lines.
                        damaged += 1
                        offset += len(line)
                        continue
                    turns += not has_begun
                    # A run that was resumed, or begun anew, does these steps again.
                    lines = [earlier for earlier in lines if earlier.step < step]
                    alerts = [alert for alert in alerts if alert.step < step]
                lines.append(_Line(step, offset, len(line)))
                has_begun = False
            elif line.strip():
                try:
                    data = jsonl.parse(line)
                    if "info" in data:
                        info = _updated(info, jsonl.info_of(data["info"]))
                        has_begun = True
                    elif "alert" in data:
                        alerts.append(_alert_from_dict(data["alert"]))
                    elif "record" in data:
                        damaged += 1
                except jsonl.DamagedLine:
                    damaged += 1
            offset += len(line)
        chosen = lines if every_record else _spread(lines)
        notes = []
        if len(chosen) < len(lines):
            notes.append(f"{len(lines):,} points, {len(chosen):,} of them read; the windows between are added up")
        table = _Table()
        before: dict[str, LayerRecord] = {}
        last = -1
        positions = {line.offset: at for at, line in enumerate(lines)}
        for line_of in chosen:
            file.seek(line_of.offset)
            try:
                record = jsonl.record_of(file.read(line_of.length), line_of.step)
            except jsonl.DamagedLine:
                damaged += 1
                continue
            at = positions[line_of.offset]
            for layer in record.layers:
                table.add(record.step, _widened(layer, before.get(layer.name)) if at > last + 1 else layer)
            before = {layer.name: layer for layer in record.layers}
            last = at
    if not before:
        return None
    if damaged:
        notes.append(
            f"{damaged:,} damaged line{'s' * (damaged > 1)} left out: torn, where the training was killed or is still "
            "writing, or changed afterwards"
        )
    if turns > 1:
        notes.append(
            f"steps go back {turns:,} times without a new beginning: two trainings wrote to this file at once, or one "
            "loaded checkpoints as often. Of each step the later point counts; give each training a file of its own"
        )
    if table.left_out:
        notes.append(_of_nonfinite(table.left_out))
    info = legacy.declared(info, table.gauges)
    layers = table.layers(info)
    return Run(path.name, path, info, layers, _models(layers), tuple(alerts), tuple(notes))


def _is_damaged(line: bytes, step: int) -> bool:
    try:
        jsonl.record_of(line, step)
    except jsonl.DamagedLine:
        return True
    return False


def _of_nonfinite(points: int) -> str:
    return f"{points:,} point{'s' * (points > 1)} left out that are not finite"


def _spread(lines: Sequence[_Line]) -> Sequence[_Line]:
    size = sum(line.length for line in lines)
    if size <= _BYTES_READ_AT_MOST:
        return lines
    points = max(_POINTS_READ_AT_LEAST, len(lines) * _BYTES_READ_AT_MOST // size)
    if points >= len(lines):
        return lines
    return [lines[at] for at in np.unique(np.linspace(0, len(lines) - 1, points).round().astype(int))]


def _widened(layer: LayerRecord, before: LayerRecord | None) -> LayerRecord:
    """With the window since an earlier record than the last one, where counting was not begun anew in between."""
    window = layer.total - before.total if before is not None else layer.total
    counted = [number for name, number in vars(window).items() if name != "ratios"]
    return layer if min(counted) < 0 else replace(layer, window=window)


def _alert_from_dict(data: Any) -> Alert:
    if not isinstance(data, dict):
        raise jsonl.DamagedLine
    step, *words = (data.get(name, "") for name in Alert._fields)
    step = step or 0
    if type(step) is not int or not 0 <= step < 2**63:
        raise jsonl.DamagedLine
    return Alert(step, *(str(word) for word in words))


def _updated(info: RunInfo, newer: RunInfo) -> RunInfo:
    """What was tracked at any time, as it was last."""
    return RunInfo(
        {**info.tracked, **newer.tracked},
        newer.skipped,
        newer.settings or info.settings,
        newer.notes,
        values=tuple({value.name: value for value in (*info.values, *newer.values)}.values()),
    )


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
        gauges = _gauges(info)
        for name, rows in self.points.items():
            _, dtype, quantizer = info.tracked.get(name, ("", "", split_variant(name)[1]))
            values = {value: _series(points, value in gauges) for value, points in rows.items()}
            found[name] = Layer(name, self.weights[name], dtype, quantizer, values)
        return found


def _gauges(info: RunInfo) -> set[str]:
    return {value.name for value in (*CORE_VALUES, *info.values) if value.kind == "gauge"}


def _series(points: Sequence[tuple[float, float, float]], gauge: bool) -> Series:
    steps, numerators, denominators = np.array(points, dtype=np.float64).reshape(-1, 3).T
    return Series(steps.astype(np.int64), numerators, denominators, gauge)


def _models(layers: Mapping[str, Layer]) -> dict[str, dict[str, Series]]:
    variants = dict.fromkeys(layer.variant for layer in layers.values())
    return {variant: sums([layer for layer in layers.values() if layer.variant == variant]) for variant in variants}


def sums(layers: Sequence[Layer]) -> dict[str, Series]:
    """Every number of some layers together."""
    names = dict.fromkeys(name for layer in layers for name in layer.values if name != "nonfinite_weights")
    return {name: total(layer.get(name) for layer in layers) for name in names}


# ---------------------------------------------------------------------- event files


_MARK = b"flips/rate"


def _span(path: Path) -> tuple[float, float] | None:
    """The times of the first and of the last point of ours in an event file; None where there is none.

    A file is a row of records: length (8 bytes), its checksum (4), an event, the event's checksum (4). An event begins
    with its time: a tag, 9, and a double.
    """
    first = last = None
    if not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0
        while at + 12 <= len(data):
            begin = at + 12
            end = begin + struct.unpack_from("<Q", data, at)[0]
            if end > len(data):
                break
            if end - begin >= 9 and data[begin] == 9 and data.find(_MARK, begin, end) >= 0:
                (last,) = struct.unpack_from("<d", data, begin + 1)
                first = last if first is None else first
            at = end + 4
    return None if first is None or last is None else (first, last)


def _writers(spans: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Which of some spans of time follow each other: those of one training, that was resumed. Others wrote at once."""
    chains: list[list[int]] = []
    for index in sorted(range(len(spans)), key=lambda index: spans[index][0]):
        over = [chain for chain in chains if spans[chain[-1]][1] <= spans[index][0]]
        if over:
            max(over, key=lambda chain: spans[chain[-1]][1]).append(index)
        else:
            chains.append([index])
    return chains


def _read_events(path: Path) -> list[Run]:
    """One run; several where their writers were at work at once; none for event files without our tags."""
    files = [path] if path.is_file() else sorted(path.glob("*tfevents*"))
    spans = {file: span for file in files if len(files) > 1 and file.is_file() and (span := _span(file)) is not None}
    ours = list(spans)
    chains = _writers(list(spans.values()))
    if len(chains) < 2:
        run = _read_event_files(path, [path])
        return [] if run is None else [run]
    runs = [_read_event_files(path, [ours[index] for index in chain]) for chain in chains]
    note = (
        f"one of {len(chains)} trainings that wrote to this directory at once, kept apart; "
        "give each a directory of its own"
    )
    return [
        replace(run, path=path / f"writer {at}", notes=(*run.notes, note))
        for at, run in enumerate(runs, 1)
        if run is not None
    ]


class _Events(NamedTuple):
    """What we read of event files: points by tag, and the text panels."""

    scalars: dict[str, list[Any]]
    texts: list[str]


def _load(paths: Sequence[Path]) -> _Events:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ReportError("reading event files needs the tensorboard package: pip install tensorboard") from error
    # All scalars and text, and nothing else that a user's writer may hold.
    sizes = {"scalars": 0, "tensors": 1000, "images": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1}
    accumulators: list[Any] = [EventAccumulator(str(path), sizes) for path in paths]
    logger = logging.getLogger("tensorboard")
    level = logger.level
    # It says that a resumed run replaces points of the one before: as it should.
    logger.setLevel(logging.ERROR)
    try:
        for events in accumulators:
            events.Reload()
    finally:
        logger.setLevel(level)
    loaded = _Events({}, [])
    panel = "weightflip/tracking/text_summary"
    for events in accumulators:
        tags = events.Tags()
        for tag in tags["scalars"]:
            loaded.scalars.setdefault(tag, []).extend(events.Scalars(tag))
        for event in events.Tensors(panel) if panel in tags["tensors"] else ():
            loaded.texts.extend(text.decode("utf-8", "replace") for text in event.tensor_proto.string_val)
    return loaded


def _read_event_files(path: Path, files: Sequence[Path]) -> Run | None:
    """None for event files without our tags."""
    loaded = _load(files)
    info = RunInfo({}, {})
    for text in loaded.texts:
        info = _updated(info, _info_from_markdown(text))
    info = legacy.declared(info)
    scalars = loaded.scalars
    gauges = _gauges(info)
    names = {value.name for value in (*CORE_VALUES, *info.values)}
    names |= {split_variant(tag.removeprefix("flips/"))[0] for tag in scalars if tag.startswith("flips/")}
    restarts = _restarts([points for tag, points in scalars.items() if split_variant(tag)[0] == "flips/rate"])
    left_out = 0
    of_layers: dict[str, dict[str, Series]] = {}
    models: dict[str, dict[str, Series]] = {}
    every = _whole_number(info.settings.get("track_every"), 1)
    tracked = info.tracked or {tag.partition("/")[2] for tag in scalars if tag.startswith("flip_rate/")}
    for tag, found in scalars.items():
        value, _, of = tag.partition("/")
        if value == "flips":
            value, variant = split_variant(of)
            value, rows, weights = _MODEL_VALUES.get(value, value), models.setdefault(variant, {}), 1
        elif value in names and of in tracked:
            rows, weights = of_layers.setdefault(of, {}), _size(info, of)
        else:
            continue
        points = _points(found, restarts)
        finite = [(step, number) for step, number in points if math.isfinite(number)]
        left_out += len(points) - len(finite)
        rows[value] = _from_quotients(finite, value in gauges, max(1, weights), every, value == "nonfinite_weights")
    layers = {}
    for name in (name for name in [*info.tracked, *of_layers] if name in of_layers and name not in layers):
        _, dtype, quantizer = info.tracked.get(name, ("", "", split_variant(name)[1]))
        layers[name] = Layer(name, _size(info, name), dtype, quantizer, of_layers[name])
    if not any(len(layer.get("flip_rate")) for layer in layers.values()):
        return None
    notes = (_of_nonfinite(left_out),) if left_out else ()
    return Run(path.name, path, info, layers, models or _models(layers), notes=notes)


def _restarts(series: Iterable[Sequence[Any]]) -> list[tuple[int, float]]:
    """Step and time of the points after which a run that was resumed, or begun anew, does steps again."""
    found = []
    for scalars in series:
        for before, after in itertools.pairwise(scalars):
            if after.step <= before.step:
                found.append((after.step, after.wall_time))
    return found


def _points(scalars: Iterable[Any], restarts: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [
        (scalar.step, scalar.value)
        for scalar in scalars
        if not any(scalar.step >= step and scalar.wall_time < time for step, time in restarts)
    ]


def _from_quotients(points: Sequence[tuple[int, float]], gauge: bool, weights: int, every: int, count: bool) -> Series:
    steps = np.array([step for step, _ in points], dtype=np.int64)
    values = np.array([value for _, value in points], dtype=np.float64)
    if count:
        return Series(steps, values, np.ones(len(steps)), gauge)
    spans = np.full(len(steps), float(weights))
    if not gauge and len(steps):
        first = steps[1] - steps[0] if len(steps) > 1 else steps[0]
        spans *= np.ceil(np.maximum(1, np.diff(steps, prepend=max(0, steps[0] - first))) / every)
    return Series(steps, values * spans, spans, gauge)


def _size(info: RunInfo, name: str) -> int:
    shape = info.tracked.get(name, ("", "", ""))[0]
    if shape == "scalar":
        return 1
    if not re.fullmatch(r"[0-9]{1,18}(x[0-9]{1,18}){,16}", shape):
        return 0
    size = math.prod(int(size) for size in shape.split("x"))
    return size if size < 2**63 else 0


def _whole_number(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and re.fullmatch("[0-9]{1,18}", text) and int(text) else otherwise


def _info_from_markdown(text: str) -> RunInfo:
    """The inverse of ``RunInfo.to_markdown``, for the rows of the tracked weights and the settings."""
    tracked: dict[str, tuple[str, str, str]] = {}
    table = text.partition("| weight | shape | dtype | quantizer |")[2].partition("\n\n")[0]
    for row in re.finditer(r"^\| `(.+)` \| ([^|]*) \| ([^|]*) \| (.*) \|$", table, re.M):
        tracked[row[1]] = (row[2], row[3], row[4])
    settings = dict(part.split("=", 1) for part in text.splitlines()[-1].split(", ") if "=" in part)
    numbers = text.partition("| number | kind | unit | what it is |\n")[2].partition("\n\n")[0]
    rows = re.finditer(r"^\| `(.+)` \| (rate|gauge|histogram) \| (share|count|number) \| (.*) \|$", numbers, re.M)
    values = [
        jsonl.value_of(dict(zip(("name", "kind", "unit", "description"), row.groups(), strict=True))) for row in rows
    ]
    notes = tuple(line[2:] for line in text.partition("| weight |")[0].splitlines() if line.startswith("- "))
    return RunInfo(tracked, {}, settings, notes, values=tuple(values))
