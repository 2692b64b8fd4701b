"""Event files and JSONL, during or after training, to :class:`Run`: what every view of a report is made from."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from weightflip.records import MODEL_TAGS, FlipRecord, LayerRecord, RunInfo, split_variant

# Numbers of one moment; all others are quotients over the window since the last logging point.
GAUGES = {
    "cumulative_flip_rate",
    "nonfinite_weights",
    "oscillating_fraction",
    "ever_flipped",
    "net_flipped",
    "travel_high_fraction",
    "zero_fraction",
    "saturated_fraction",
    "underflow_fraction",
    "stable_rank",
    "effective_rank",
}
WINDOWS = {
    "flip_rate",
    "stall_ratio",
    "scale_changes",
    "oscillation_ratio",
    "weight_driven_fraction",
    "travel_ratio",
    "flip_excess",
}
# What a run of 10,000 points of 200 layers has forty times of; a view shows a few hundred points at most.
_BYTES_READ_AT_MOST = 24_000_000
_POINTS_READ_AT_LEAST = 200
_RECORD = re.compile(rb'\s*\{\s*"record"\s*:\s*\{\s*"step"\s*:\s*(\d+)\s*,')
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
        if self.gauge:
            return float(self.values[-1])
        return float(self.numerators.sum() / self.denominators.sum())

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
        path: Where it was read.
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
        run = _read_jsonl(path, every_record) if path.suffix == ".jsonl" else _read_events(path)
        if run is not None:
            yield run
        return
    for directory, below, files in os.walk(path):
        below.sort()
        jsonl = [Path(directory, file) for file in sorted(files) if file.endswith(".jsonl")]
        runs = [run for file in jsonl if (run := _read_jsonl(file, every_record)) is not None]
        if len(runs) == 1:
            runs = [replace(runs[0], path=Path(directory))]
        if not runs and any("tfevents" in file for file in files):
            run = _read_events(Path(directory))
            runs = [] if run is None else [run]
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
    with path.open("rb") as file:
        offset = 0
        for line in file:
            match = _RECORD.match(line)
            if match:
                step = int(match[1])
                if lines and lines[-1].step >= step:
                    # A run that was resumed, or begun anew, does these steps again.
                    lines = [earlier for earlier in lines if earlier.step < step]
                    alerts = [alert for alert in alerts if alert.step < step]
                lines.append(_Line(step, offset, len(line)))
            elif line.startswith((b'{"info"', b'{"alert"')):
                data = _parse(line)
                if isinstance(data.get("info"), dict):
                    info = _updated(info, _info_from_dict(data["info"]))
                if isinstance(data.get("alert"), dict):
                    alerts.append(_alert_from_dict(data["alert"]))
            offset += len(line)
        chosen = lines if every_record else _spread(lines)
        notes = []
        if len(chosen) < len(lines):
            notes.append(f"{len(lines):,} points, {len(chosen):,} of them read; the windows between are added up")
        table = _Table()
        before: dict[str, LayerRecord] = {}
        last = -1
        unread = 0
        positions = {line.offset: at for at, line in enumerate(lines)}
        for line_of in chosen:
            file.seek(line_of.offset)
            try:
                record = FlipRecord.from_dict(_parse(file.read(line_of.length))["record"])
            except (KeyError, TypeError, ValueError):
                unread += 1
                continue
            at = positions[line_of.offset]
            for layer in record.layers:
                table.add(record.step, _widened(layer, before.get(layer.name)) if at > last + 1 else layer)
            before = {layer.name: layer for layer in record.layers}
            last = at
    if not before:
        return None
    if unread:
        notes.append(f"{unread} torn line{'s' * (unread > 1)} left out: the training was killed, or is still writing")
    layers = table.layers(info)
    return Run(path.name, path, info, layers, _models(layers), tuple(alerts), tuple(notes))


def _parse(line: bytes) -> dict[str, Any]:
    """A torn line is empty."""
    try:
        data = json.loads(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


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
    counted = (window.weight_steps, window.flips, window.updates, window.stalled, window.scale_steps)
    return layer if min(counted) < 0 else replace(layer, window=window)


def _info_from_dict(data: Mapping[str, Any]) -> RunInfo:
    return RunInfo(
        {name: (row[0], row[1], row[2]) for name, row in data.get("tracked", {}).items()},
        dict(data.get("skipped", {})),
        dict(data.get("settings", {})),
        tuple(data.get("notes", ())),
    )


def _alert_from_dict(data: Mapping[str, Any]) -> Alert:
    step, *words = (data.get(name, "") for name in Alert._fields)
    return Alert(int(step or 0), *(str(word) for word in words))


def _updated(info: RunInfo, newer: RunInfo) -> RunInfo:
    """What was tracked at any time, as it was last."""
    return RunInfo({**info.tracked, **newer.tracked}, newer.skipped, newer.settings or info.settings, newer.notes)


@dataclass
class _Table:
    """Collects points, layer by layer and value by value."""

    points: dict[str, dict[str, list[tuple[float, float, float]]]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    gauges: set[str] = field(default_factory=lambda: set(GAUGES))

    def add(self, step: int, layer: LayerRecord) -> None:
        rows = self.points.setdefault(layer.name, {})
        self.weights[layer.name] = layer.weights
        self.gauges.update(layer.gauges)
        for name, quotient in layer.quotients.items():
            rows.setdefault(name, []).append((step, *quotient))
        if layer.nonfinite:
            rows.setdefault("nonfinite_weights", []).append((step, layer.nonfinite, 1))

    def layers(self, info: RunInfo) -> dict[str, Layer]:
        found = {}
        for name, rows in self.points.items():
            _, dtype, quantizer = info.tracked.get(name, ("", "", split_variant(name)[1]))
            values = {value: _series(points, value in self.gauges) for value, points in rows.items()}
            found[name] = Layer(name, self.weights[name], dtype, quantizer, values)
        return found


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


def _read_events(path: Path) -> Run | None:
    """None for event files without our tags."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ReportError("reading event files needs the tensorboard package: pip install tensorboard") from error
    # All scalars and text, and nothing else that a user's writer may hold.
    sizes = {"scalars": 0, "tensors": 1000, "images": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1}
    events: Any = EventAccumulator(str(path), sizes)
    logger = logging.getLogger("tensorboard")
    level = logger.level
    # It says that a resumed run replaces points of the one before: as it should.
    logger.setLevel(logging.ERROR)
    try:
        events.Reload()
    finally:
        logger.setLevel(level)
    tags = events.Tags()
    info = RunInfo({}, {})
    if "weightflip/tracking/text_summary" in tags["tensors"]:
        for event in events.Tensors("weightflip/tracking/text_summary"):
            for text in event.tensor_proto.string_val:
                info = _updated(info, _info_from_markdown(text.decode("utf-8", "replace")))

    scalars = set(tags["scalars"])
    names = GAUGES | WINDOWS
    names |= {split_variant(tag.removeprefix("flips/"))[0] for tag in scalars if tag.startswith("flips/")}
    restarts = _restarts(events, [tag for tag in scalars if split_variant(tag)[0] == "flips/rate"])
    of_layers: dict[str, dict[str, Series]] = {}
    models: dict[str, dict[str, Series]] = {}
    every = _whole_number(info.settings.get("track_every"), 1)
    tracked = info.tracked or {tag.partition("/")[2] for tag in scalars if tag.startswith("flip_rate/")}
    for tag in tags["scalars"]:
        value, _, of = tag.partition("/")
        if value == "flips":
            value, variant = split_variant(of)
            value, rows, weights = _MODEL_VALUES.get(value, value), models.setdefault(variant, {}), 1
        elif value in names and of in tracked:
            rows, weights = of_layers.setdefault(of, {}), _size(info, of)
        else:
            continue
        points = _points(events.Scalars(tag), restarts)
        rows[value] = _from_quotients(points, value in GAUGES, max(1, weights), every, value == "nonfinite_weights")
    layers = {}
    for name in (name for name in [*info.tracked, *of_layers] if name in of_layers and name not in layers):
        _, dtype, quantizer = info.tracked.get(name, ("", "", split_variant(name)[1]))
        layers[name] = Layer(name, _size(info, name), dtype, quantizer, of_layers[name])
    if not any(len(layer.get("flip_rate")) for layer in layers.values()):
        return None
    return Run(path.name, path, info, layers, models or _models(layers))


def _restarts(events: Any, tags: Sequence[str]) -> list[tuple[int, float]]:
    """Step and time of the points after which a run that was resumed, or begun anew, does steps again."""
    found = []
    for tag in tags:
        scalars = events.Scalars(tag)
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
    return math.prod(int(size) for size in shape.split("x")) if re.fullmatch(r"\d+(x\d+)*", shape) else 0


def _whole_number(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and text.isdecimal() and int(text) else otherwise


def _info_from_markdown(text: str) -> RunInfo:
    """The inverse of ``RunInfo.to_markdown``, for the rows of the tracked weights and the settings."""
    tracked: dict[str, tuple[str, str, str]] = {}
    table = text.partition("| weight | shape | dtype | quantizer |")[2].partition("\n\n")[0]
    for row in re.finditer(r"^\| `(.+)` \| ([^|]*) \| ([^|]*) \| (.*) \|$", table, re.M):
        tracked[row[1]] = (row[2], row[3], row[4])
    settings = dict(part.split("=", 1) for part in text.splitlines()[-1].split(", ") if "=" in part)
    notes = tuple(line[2:] for line in text.partition("| weight |")[0].splitlines() if line.startswith("- "))
    return RunInfo(tracked, {}, settings, notes)
