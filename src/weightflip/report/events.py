"""Event files, during or after training, to :class:`Run`: quotients, and what can be estimated from them."""

from __future__ import annotations

import itertools
import logging
import math
import mmap
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weightflip.records import CORE_VALUES, MODEL_TAGS, RunInfo, split_variant
from weightflip.report import legacy, lines
from weightflip.report.run import (
    Layer,
    ReportError,
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


def read(path: Path) -> list[Run]:
    """One run; several where their writers were at work at once; none for event files without our tags."""
    files = [path] if path.is_file() else sorted(path.glob("*tfevents*"))
    spans = {file: found for file in files if len(files) > 1 and file.is_file() and (found := span(file)) is not None}
    ours = list(spans)
    chains = chains_of([(found.begin, found.end) for found in spans.values()])
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
        info = updated(info, _info_from_markdown(text))
    info = legacy.declared(info)
    scalars = loaded.scalars
    gauges = gauges_of(info)
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
    notes = (of_nonfinite(left_out),) if left_out else ()
    return Run(path.name, path, info, layers, models or models_of(layers), notes=notes)


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
        lines.value_of(dict(zip(("name", "kind", "unit", "description"), row.groups(), strict=True))) for row in rows
    ]
    notes = tuple(line[2:] for line in text.partition("| weight |")[0].splitlines() if line.startswith("- "))
    return RunInfo(tracked, {}, settings, notes, values=tuple(values))
