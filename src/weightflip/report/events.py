"""Event files, during or after training, to :class:`Run`: quotients, and what can be estimated from them."""

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
    chains_of,
    gauges_of,
    models_of,
    of_nonfinite,
    updated,
)

_MODEL_VALUES = {tag.removeprefix("flips/"): name for name, tag in MODEL_TAGS.items()}
_MARK = b"flips/rate"


class Span(NamedTuple):
    """The times of the first and of the last point of ours in an event file, and the step of the first."""

    begin: float
    end: float
    first_step: int


def span(path: Path) -> Span | None:
    """Where an event file begins and ends; None where it has no point of ours."""
    if not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        first = last = None
        at = data.find(_MARK)
        while at >= 0 and first is None:
            first, at = _point_at(data, at), data.find(_MARK, at + 1)
        at = data.rfind(_MARK)
        while at >= 0 and last is None:
            last, at = _point_at(data, at), data.rfind(_MARK, 0, at)
    return None if first is None or last is None else Span(first[0], last[0], first[1])


def _point_at(data: mmap.mmap, at: int) -> tuple[float, int] | None:
    """Time and step of the event around a place in a file; None if it is no scalar, or not whole.

    A file is a row of records: length (8 bytes), its checksum (4), an event, the event's checksum (4). An event begins
    with its time: a tag, 9, and a double; then its step: a tag, 16, and 7 bits a byte, the lowest first, of which the
    last byte has no eighth. It holds a scalar's tag after a few bytes.
    """
    if at < 2 or data[at - 2] != 10 or data[at - 1] < len(_MARK):
        # No tag, which follows a 10 and its length: some text.
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
    """One run; several where their writers were at work at once; none for event files without our tags.

    Args:
        path: A file or a directory.
        progress: Called with a number of bytes, each time that so many more are read.
    """
    files = [path] if path.is_file() else sorted(path.glob("*tfevents*"))
    spans = {file: found for file in files if len(files) > 1 and file.is_file() and (found := span(file)) is not None}
    ours = list(spans)
    chains = chains_of([(found.begin, found.end) for found in spans.values()])
    if len(chains) < 2:
        run = _read_event_files(path, [file for file in files if file.is_file()], progress)
        return [] if run is None else [run]
    runs = [_read_event_files(path, [ours[index] for index in chain], progress) for chain in chains]
    note = (
        f"one of {len(chains)} trainings that wrote to this directory at once, kept apart; "
        "give each a directory of its own"
    )
    return [
        replace(run, path=path / f"writer {at}", notes=(*run.notes, note))
        for at, run in enumerate(runs, 1)
        if run is not None
    ]


_TRACKED, _ALERTS = "weightflip/tracking", (ALERTS_TAG, "weightflip/alerts")
_ALERT = re.compile(r"^- step (\d{1,18}): ([^:]+): (.*)$", re.M)
_SEVERAL = re.compile(r"(.*) and (\d{1,9}) more")


def _read_event_files(path: Path, files: Sequence[Path], progress: Callable[[float], object]) -> Run | None:
    """None for event files without our tags."""
    loaded = tfevents.read(files, progress)
    info = RunInfo({}, {})
    for panel in loaded.texts.get(_TRACKED, ()):
        info = updated(info, _info_from_markdown(panel.text))
    info = legacy.declared(info)
    gauges = gauges_of(info)
    names = {value.name for value in (*CORE_VALUES, *info.values)}
    names |= {split_variant(tag.removeprefix("flips/"))[0] for tag in loaded.scalars if tag.startswith("flips/")}
    quotients = _Quotients(_restarts(loaded), _whole_number(info.settings.get("track_every"), 1))
    of_layers: dict[str, dict[str, Series]] = {}
    models: dict[str, dict[str, Series]] = {}
    rates = ("flip_rate/", "cumulative_flip_rate/")
    tracked = info.tracked or {tag.partition("/")[2] for tag in loaded.scalars if tag.startswith(rates)}
    for tag, points in loaded.scalars.items():
        value, _, of = tag.partition("/")
        if value == "flips":
            value, variant = split_variant(of)
            value, rows, weights = _MODEL_VALUES.get(value, value), models.setdefault(variant, {}), 1
        elif value in names and of in tracked:
            rows, weights = of_layers.setdefault(of, {}), _size(info, of)
        else:
            continue
        if value == "nonfinite_weights":
            rows[value] = quotients.counts(points, value in gauges)
        else:
            rows[value] = quotients.series(points, value in gauges, max(1, weights))
    of_cumulative = [rows for rows in of_layers.values() if _add_flip_rates(rows, quotients)]
    layers = {}
    for name in (name for name in [*info.tracked, *of_layers] if name in of_layers and name not in layers):
        _, dtype, quantizer = info.tracked.get(name, ("", "", split_variant(name)[1]))
        layers[name] = Layer(name, _size(info, name), dtype, quantizer, of_layers[name])
    if not any(len(layer.get("flip_rate")) for layer in layers.values()):
        return None
    alerts = tuple(quotients.valid(text for tag in _ALERTS for text in loaded.texts.get(tag, ())))
    notes: tuple[str, ...] = (of_nonfinite(quotients.left_out),) if quotients.left_out else ()
    if of_cumulative:
        notes += (
            f"flip rates of {len(of_cumulative)} layers are those of their cumulative ones: event files have no other "
            "number of them",
        )
    return Run(path.name, path, info, layers, models or models_of(layers), _alerts(alerts), notes)


def _add_flip_rates(rows: dict[str, Series], quotients: _Quotients) -> bool:
    """Flip rates where there are none at all points: of many layers, TensorBoard has the cumulative one alone."""
    cumulative = rows.get("cumulative_flip_rate")
    if cumulative is None or len(rows.get("flip_rate", EMPTY)) >= len(cumulative):
        return False
    rows["flip_rate"] = quotients.differences(cumulative)
    return True


def _restarts(loaded: tfevents.Events) -> list[tuple[int, float]]:
    """Step and time of the points after which a run that was resumed, or begun anew, does steps again."""
    found = list(loaded.starts)
    for tag, points in loaded.scalars.items():
        if split_variant(tag)[0] == _MARK.decode():
            back = np.flatnonzero(np.diff(points.steps) <= 0) + 1
            found += zip(points.steps[back].tolist(), points.times[back].tolist(), strict=True)
    return found


class _Quotients:
    """Makes series of points; those of tags that were written together share their steps.

    Args:
        restarts: As of :func:`_restarts`.
        every: Optimizer steps from one tracked step to the next.

    Attributes:
        left_out: Points that were not finite.
    """

    def __init__(self, restarts: Sequence[tuple[int, float]], every: int) -> None:
        self._restarts = restarts
        self._every = every
        self.left_out = 0
        # By the identity of the arrays that they were made of, which are kept with them.
        self._kept: dict[int, tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]] = {}
        self._spans: dict[tuple[int, bool, int], tuple[NDArray[np.int64], NDArray[np.float64]]] = {}

    def valid(self, texts: Iterable[tfevents.Text]) -> Iterator[tfevents.Text]:
        """Those of steps that were not done again."""
        for text in texts:
            if not any(text.step >= step and text.time < time for step, time in self._restarts):
                yield text

    def counts(self, points: tfevents.Points, gauge: bool) -> Series:
        """Numbers that are no quotients."""
        steps, values = self._finite(points)
        return Series(steps, values, np.ones(len(steps)), gauge)

    def series(self, points: tfevents.Points, gauge: bool, weights: int) -> Series:
        """Quotients, with denominators of which the proportions are known."""
        steps, values = self._finite(points)
        key = id(steps), gauge, weights
        if key not in self._spans:
            self._spans[key] = steps, self._denominators(steps, gauge, weights)
        spans = self._spans[key][1]
        return Series(steps, values * spans, spans, gauge)

    def differences(self, cumulative: Series) -> Series:
        """What was counted from point to point, of what was counted since the start for each weight."""
        steps, weights = cumulative.steps, cumulative.denominators
        spans = self._denominators(steps, False, 1) * weights
        counted = np.diff(cumulative.numerators, prepend=0.0).clip(0.0)
        # Of a run that was resumed elsewhere, the first number is that of all steps before.
        begin = int(len(steps) > 1 and steps[0] > 1.5 * (steps[1] - steps[0]))
        return Series(steps[begin:], counted[begin:], spans[begin:], False)

    def _finite(self, points: tfevents.Points) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
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

    def _denominators(self, steps: NDArray[np.int64], gauge: bool, weights: int) -> NDArray[np.float64]:
        spans = np.full(len(steps), float(weights))
        if not gauge and len(steps):
            first = steps[1] - steps[0] if len(steps) > 1 else steps[0]
            spans *= np.ceil(np.maximum(1, np.diff(steps, prepend=max(0, steps[0] - first))) / self._every)
        return spans


def _alerts(texts: Iterable[tfevents.Text]) -> tuple[Alert, ...]:
    """The inverse of ``records.alert_lines``; of the layers that a line does not name, there is their number."""
    found = []
    for text in texts:
        for line in _ALERT.finditer(text.text):
            step, rule, rest = int(line[1]), line[2], line[3]
            if several := _SEVERAL.fullmatch(rest):
                found += [Alert(step, layer, rule, "") for layer in several[1].split(", ")]
                found.append(Alert(step, "", rule, "", int(several[2])))
            else:
                layer = rest.rpartition(" (")[0]
                found.append(Alert(step, layer, rule, line[0].removeprefix("- ")))
    return tuple(found)


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
        lines.value_of(dict(zip(("name", "kind", "unit", "description"), row.groups(), strict=True))) for row in rows
    ]
    notes = tuple(line[2:] for line in text.partition("| weight |")[0].splitlines() if line.startswith("- "))
    return RunInfo(tracked, {}, settings, notes, values=tuple(values))
