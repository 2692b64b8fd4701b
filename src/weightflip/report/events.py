"""Reads event files into :class:`Run` objects, during or after training: ratios, and estimates based on them."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from weightflip.records import ALERTS_TAG, CORE_VALUES, MODEL_TAGS, RunInfo, split_variant
from weightflip.report import legacy, lines, tfevents
from weightflip.report.run import (
    EMPTY,
    Alert,
    Layer,
    Run,
    Series,
    gauge_names,
    group_into_chains,
    merge_info,
    nonfinite_note,
    sum_models,
)

_MODEL_VALUES = {tag.removeprefix("flips/"): name for name, tag in MODEL_TAGS.items()}
_MARK = b"flips/rate"


class Span(NamedTuple):
    """Times of our first and last point in an event file, and the step of the first."""

    begin: float
    end: float
    first_step: int


def find_span(path: Path) -> Span | None:
    """Find the span of our points in an event file; None if there are none."""
    if not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        first = last = None
        at = data.find(_MARK)
        while at >= 0 and first is None:
            first, at = _parse_point_at(data, at), data.find(_MARK, at + 1)
        at = data.rfind(_MARK)
        while at >= 0 and last is None:
            last, at = _parse_point_at(data, at), data.rfind(_MARK, 0, at)
    return None if first is None or last is None else Span(first[0], last[0], first[1])


def _parse_point_at(data: mmap.mmap, at: int) -> tuple[float, int] | None:
    """Time and step of the event around a position; None if it is not a scalar or incomplete.

    A file is a sequence of records: length (8 bytes), its checksum (4), an event, the event's checksum (4). An event
    starts with its time: tag 9 and a double. Then follows its step: tag 16 and a varint with 7 bits per byte, lowest
    first; all bytes except the last have the eighth bit set. The tag of a scalar follows after a few bytes.
    """
    if at < 2 or data[at - 2] != 10 or data[at - 1] < len(_MARK):
        # Some other text: a scalar's tag is preceded by a 10 and its length.
        return None
    for begin in range(at - 1, max(11, at - 80), -1):
        if data[begin] == 9:
            end = begin + struct.unpack_from("<Q", data, begin - 12)[0]
            if at < end <= len(data) and end - begin < 1 << 20:
                (time,) = struct.unpack_from("<d", data, begin + 1)
                if 0 < time < 1e12:
                    step = places = 0
                    if data[begin + 9] == 16:
                        for byte in data[begin + 10 : begin + 20]:
                            step |= (byte & 127) << places
                            places += 7
                            if byte < 128:
                                break
                    return float(time), step
    return None


def read(path: Path, progress: Callable[[float], object] = lambda size: None) -> list[Run]:
    """Read one run, several runs if they wrote at the same time, or none if the files lack our tags.

    Args:
        path: A file or a directory.
        progress: Called with the number of bytes read since the last call.
    """
    files = [path] if path.is_file() else sorted(path.glob("*tfevents*"))
    spans = {}
    for file in files if len(files) > 1 else ():
        if file.is_file() and (span := find_span(file)) is not None:
            spans[file] = span
    ours = list(spans)
    chains = group_into_chains([(span.begin, span.end) for span in spans.values()])
    if len(chains) < 2:
        run = _read_event_files(path, [file for file in files if file.is_file()], progress)
        return [] if run is None else [run]
    runs = [_read_event_files(path, [ours[index] for index in chain], progress) for chain in chains]
    note = f"one of {len(chains)} trainings that wrote to this directory at the same time; give each its own directory"
    return [
        replace(run, path=path / f"writer {at}", notes=(*run.notes, note))
        for at, run in enumerate(runs, 1)
        if run is not None
    ]


_TRACKED, _ALERTS = "weightflip/tracking", (ALERTS_TAG, "weightflip/alerts")
_ALERT = re.compile(r"^- step (\d{1,18}): ([^:]+): (.*)$", re.M)
# A row of the text panel's table of numbers. Earlier versions have no title column.
_VALUE_ROW = re.compile(
    r"^\| `(?P<name>.+)` \| (?:(?P<title>.*) \| )?(?P<kind>rate|gauge|histogram) \| (?P<unit>share|count|number) \| "
    r"(?P<description>.*) \|$",
    re.M,
)
_SEVERAL = re.compile(r"(.*) and (\d{1,9}) more")


def _read_event_files(path: Path, files: Sequence[Path], progress: Callable[[float], object]) -> Run | None:
    """Read some files as one run; None if they lack our tags."""
    loaded = tfevents.read(files, progress)
    info = RunInfo({}, {})
    for panel in loaded.texts.get(_TRACKED, ()):
        info = merge_info(info, _info_from_markdown(panel.text))
    info = legacy.add_legacy_values(info)
    gauges = gauge_names(info)
    names = {value.name for value in (*CORE_VALUES, *info.values)}
    names |= {split_variant(tag.removeprefix("flips/"))[0] for tag in loaded.scalars if tag.startswith("flips/")}
    builder = _SeriesBuilder(_find_restarts(loaded), _parse_positive_int(info.settings.get("track_every"), 1))
    of_layers: dict[str, dict[str, Series]] = {}
    models: dict[str, dict[str, Series]] = {}
    rates = ("flip_rate/", "cumulative_flip_rate/")
    tracked = info.tracked or {tag.partition("/")[2] for tag in loaded.scalars if tag.startswith(rates)}
    for tag, points in loaded.scalars.items():
        value, _, subject = tag.partition("/")
        if value == "flips":
            value, variant = split_variant(subject)
            value, rows, weights = _MODEL_VALUES.get(value, value), models.setdefault(variant, {}), 1
        elif value in names and subject in tracked:
            rows, weights = of_layers.setdefault(subject, {}), _count_weights(info, subject)
        else:
            continue
        if value == "nonfinite_weights":
            rows[value] = builder.counts(points, value in gauges)
        else:
            rows[value] = builder.ratios(points, value in gauges, max(1, weights))
    of_cumulative = [rows for rows in of_layers.values() if _add_flip_rates(rows, builder)]
    layers = {}
    for name in (name for name in [*info.tracked, *of_layers] if name in of_layers and name not in layers):
        _, dtype, quantizer = info.tracked.get(name, ("", "", split_variant(name)[1]))
        layers[name] = Layer(name, _count_weights(info, name), dtype, quantizer, of_layers[name])
    if not any(len(layer.get("flip_rate")) for layer in layers.values()):
        return None
    alerts = tuple(builder.drop_repeated(text for tag in _ALERTS for text in loaded.texts.get(tag, ())))
    notes: tuple[str, ...] = (nonfinite_note(builder.left_out),) if builder.left_out else ()
    if of_cumulative:
        notes += (
            f"flip rates of {len(of_cumulative)} layers are computed from their cumulative flip rates, the only number "
            "of these layers in event files",
        )
    return Run(path.name, path, info, layers, models or sum_models(layers), _parse_alerts(alerts), notes)


def _add_flip_rates(rows: dict[str, Series], builder: _SeriesBuilder) -> bool:
    """Add flip rates to a layer that lacks points: with many layers, TensorBoard has only the cumulative rate."""
    cumulative = rows.get("cumulative_flip_rate")
    if cumulative is None or len(rows.get("flip_rate", EMPTY)) >= len(cumulative):
        return False
    rows["flip_rate"] = builder.differences(cumulative)
    return True


def _find_restarts(loaded: tfevents.Events) -> list[tuple[int, float]]:
    """Step and time of the points from which a resumed or restarted run repeats steps."""
    restarts = list(loaded.starts)
    for tag, points in loaded.scalars.items():
        if split_variant(tag)[0] == _MARK.decode():
            back = np.flatnonzero(np.diff(points.steps) <= 0) + 1
            restarts += zip(points.steps[back].tolist(), points.times[back].tolist(), strict=True)
    return restarts


class _SeriesBuilder:
    """Converts points to series. Tags that were written together share their array of steps.

    Args:
        restarts: From :func:`_find_restarts`.
        every: Optimizer steps between two tracked steps.

    Attributes:
        left_out: Number of skipped points, which were not finite.
    """

    def __init__(self, restarts: Sequence[tuple[int, float]], every: int) -> None:
        self._restarts = restarts
        self._every = every
        self.left_out = 0
        # Keyed by the identity of the source array, which is kept alive in the value.
        self._kept: dict[int, tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]] = {}
        self._spans: dict[tuple[int, bool, int], tuple[NDArray[np.int64], NDArray[np.float64]]] = {}

    def drop_repeated(self, texts: Iterable[tfevents.Text]) -> Iterator[tfevents.Text]:
        """Drop texts of steps that were repeated later."""
        for text in texts:
            if not any(text.step >= step and text.time < time for step, time in self._restarts):
                yield text

    def counts(self, points: tfevents.Points, gauge: bool) -> Series:
        """A series of numbers that are not ratios."""
        steps, values = self._finite_points(points)
        return Series(steps, values, np.ones(len(steps)), gauge)

    def ratios(self, points: tfevents.Points, gauge: bool, weights: int) -> Series:
        """A series of ratios, with denominators that are correct up to a constant factor."""
        steps, values = self._finite_points(points)
        key = id(steps), gauge, weights
        if key not in self._spans:
            self._spans[key] = steps, self._estimate_denominators(steps, gauge, weights)
        spans = self._spans[key][1]
        return Series(steps, values * spans, spans, gauge)

    def differences(self, cumulative: Series) -> Series:
        """Rates between consecutive points, from cumulative rates per weight."""
        steps, weights = cumulative.steps, cumulative.denominators
        spans = self._estimate_denominators(steps, False, 1) * weights
        counted = np.diff(cumulative.numerators, prepend=0.0).clip(0.0)
        # If the run was resumed in another directory, the first number covers all earlier steps.
        begin = int(len(steps) > 1 and steps[0] > 1.5 * (steps[1] - steps[0]))
        return Series(steps[begin:], counted[begin:], spans[begin:], False)

    def _finite_points(self, points: tfevents.Points) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        key = id(points.steps)
        if key not in self._kept:
            again = [(points.steps >= step) & (points.times < time) for step, time in self._restarts]
            last = ~np.any(again, axis=0) if again else np.ones(len(points.steps), bool)
            self._kept[key] = points.steps, last, points.steps[last]
        _, last, steps = self._kept[key]
        values = points.values[last].astype(np.float64)
        finite = np.isfinite(values)
        if finite.all():
            return steps, values
        self.left_out += int(len(finite) - finite.sum())
        return steps[finite], values[finite]

    def _estimate_denominators(self, steps: NDArray[np.int64], gauge: bool, weights: int) -> NDArray[np.float64]:
        spans = np.full(len(steps), float(weights))
        if not gauge and len(steps):
            first = steps[1] - steps[0] if len(steps) > 1 else steps[0]
            spans *= np.ceil(np.maximum(1, np.diff(steps, prepend=max(0, steps[0] - first))) / self._every)
        return spans


def _parse_alerts(texts: Iterable[tfevents.Text]) -> tuple[Alert, ...]:
    """The inverse of ``records.alert_lines``. Layers that a line counts but does not name become one nameless alert."""
    alerts = []
    for text in texts:
        for line in _ALERT.finditer(text.text):
            step, rule, rest = int(line[1]), line[2], line[3]
            if several := _SEVERAL.fullmatch(rest):
                alerts += [Alert(step, layer, rule, "") for layer in several[1].split(", ")]
                alerts.append(Alert(step, "", rule, "", int(several[2])))
            else:
                layer = rest.rpartition(" (")[0]
                alerts.append(Alert(step, layer, rule, line[0].removeprefix("- ")))
    return tuple(alerts)


def _count_weights(info: RunInfo, name: str) -> int:
    shape = info.tracked.get(name, ("", "", ""))[0]
    if shape == "scalar":
        return 1
    if not re.fullmatch(r"[0-9]{1,18}(x[0-9]{1,18}){,16}", shape):
        return 0
    size = math.prod(int(size) for size in shape.split("x"))
    return size if size < 2**63 else 0


def _parse_positive_int(text: str | None, default: int) -> int:
    return int(text) if text is not None and re.fullmatch("[0-9]{1,18}", text) and int(text) else default


def _info_from_markdown(text: str) -> RunInfo:
    """The inverse of ``RunInfo.to_markdown`` for tracked weights, notes, settings and numbers."""
    tracked: dict[str, tuple[str, str, str]] = {}
    table = text.partition("| weight | shape | dtype | quantizer |")[2].partition("\n\n")[0]
    for row in re.finditer(r"^\| `(.+)` \| ([^|]*) \| ([^|]*) \| (.*) \|$", table, re.M):
        tracked[row[1]] = (row[2], row[3], row[4])
    settings = dict(part.split("=", 1) for part in text.splitlines()[-1].split(", ") if "=" in part)
    numbers = text.partition("| number | ")[2].partition("\n\n")[0]
    values = [
        lines.parse_value({field: cell for field, cell in row.groupdict().items() if cell is not None})
        for row in _VALUE_ROW.finditer(numbers)
    ]
    notes = tuple(line[2:] for line in text.partition("| weight |")[0].splitlines() if line.startswith("- "))
    return RunInfo(tracked, {}, settings, notes, values=tuple(values))
