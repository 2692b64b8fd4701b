"""Reads TensorBoard's event files: scalars as arrays, and texts.

TensorBoard's own reader creates and checks one Python object per number, which takes a minute for a million numbers. A
training writes the same tags in the same order at each logging point, so that the bytes of two points differ only in
step, times, numbers and checksums. The first point is parsed and kept as a *layout*. Points that match the layout are
read as one array. Everything else is parsed event by event.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from weightflip.report.run import ReportError

# Minimum number of consecutive scalars of one step for a layout, and how many layouts are tried.
_MIN_EVENTS = 16
_LAYOUTS = 8
# Number of bytes compared first.
_HEAD = 1024
# Bytes between two progress calls.
_PROGRESS_EVERY = 1 << 23
# An event is preceded by its length (8 bytes) with a checksum (4), and followed by its own checksum (4).
_BEFORE, _AFTER = 12, 4
_TIME = 9
_MASK_DELTA = 0xA282EAD8

Bytes = NDArray[np.uint8]


class Points(NamedTuple):
    """One tag over time, in the order of the files. Tags that are written together share steps and times.

    Attributes:
        steps: int64, (points,).
        times: Seconds, float64, (points,).
        values: float32, (points,).
    """

    steps: NDArray[np.int64]
    times: NDArray[np.float64]
    values: NDArray[np.float32]


class Text(NamedTuple):
    """One entry of a text panel."""

    step: int
    time: float
    text: str


@dataclass
class Events:
    """Contents of some event files.

    Attributes:
        scalars: Points by tag.
        texts: Texts by tag.
        starts: Step and time of each purge, from which a writer hides older points.
    """

    scalars: dict[str, Points] = field(default_factory=dict)
    texts: dict[str, list[Text]] = field(default_factory=dict)
    starts: list[tuple[int, float]] = field(default_factory=list)


class _Scalar(NamedTuple):
    """An event with one number, at the end of the event."""

    tag: str
    step: int
    time: float
    value: float
    begin: int
    end: int


class _Layout:
    """Positions of times, steps and numbers in consecutive events of one step. Reads points that match it."""

    def __init__(self, data: Bytes, events: Sequence[_Scalar]) -> None:
        begin = events[0].begin
        self.size = events[-1].end - begin
        self.tags = [event.tag for event in events]
        starts = np.array([event.begin - begin + _BEFORE for event in events])
        ends = np.array([event.end - begin - _AFTER for event in events])
        places = len(_varint(events[0].step))
        self._values = ends[:, None] + np.arange(-4, 0)
        self._steps = starts[:, None] + np.arange(_TIME + 1, _TIME + 1 + places)
        self._time = int(starts[0]) + 1
        mask = np.full(self.size, 255, np.uint8)
        for varying in (starts[:, None] + np.arange(1, _TIME), self._steps, ends[:, None] + np.arange(-4, _AFTER)):
            mask[varying] = 0
        self._mask = mask
        self.header = data[begin : begin + _BEFORE].tobytes()
        self._template = data[begin : begin + self.size] & mask
        self._numbers: list[NDArray[np.float32]] = []
        self._points: list[tuple[int, int, float]] = []

    def try_read(self, data: Bytes, begin: int, order: int) -> bool:
        """Read the point at ``begin`` if it matches the layout."""
        found = data[begin : begin + self.size]
        if len(found) < self.size or not self._matches(found):
            return False
        steps = found[self._steps]
        step = steps[0].tobytes()
        number = sum((byte & 127) << 7 * place for place, byte in enumerate(step))
        if not (steps == steps[0]).all() or _varint(number) != step:
            return False
        time = float(found[self._time : self._time + 8].view("<f8")[0])
        self._numbers.append(found[self._values].view("<f4")[:, 0].astype(np.float32))
        self._points.append((order, number, time))
        return True

    def _matches(self, found: Bytes) -> bool:
        for part in (slice(None, _HEAD), slice(_HEAD, None)):
            if not np.array_equal(found[part] & self._mask[part], self._template[part]):
                return False
        return True

    def finish(self) -> tuple[NDArray[np.int64], Points]:
        """The order numbers of the points, and the points; values are (tags, points)."""
        orders, steps, times = zip(*self._points, strict=True)
        values = np.stack(self._numbers, axis=1)
        self._numbers = []
        return np.array(orders), Points(np.array(steps), np.array(times), values)


@dataclass
class _Singles:
    """Points of a tag that were parsed one by one."""

    orders: array[int] = field(default_factory=lambda: array("q"))
    steps: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("f"))

    def finish(self) -> tuple[NDArray[np.int64], Points]:
        steps, times, values = (np.array(part) for part in (self.steps, self.times, self.values))
        return np.array(self.orders), Points(steps, times, values[None])


def read(paths: Sequence[Path], progress: Callable[[float], object] = lambda size: None) -> Events:
    """Read scalars and texts of some event files in order.

    A file is read up to the first incomplete event, since the training may have been killed or may still be writing.

    Args:
        paths: The files, in the order in which they were started.
        progress: Called with the number of bytes read since the last call.

    Raises:
        ReportError: The tensorboard package is missing.
    """
    reader = _Reader(_event_parser(), progress)
    for path in paths:
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                reader.read(data)
    return reader.finish()


def _event_parser() -> Callable[[bytes], Any]:
    try:
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError as error:
        raise ReportError("reading event files needs the tensorboard package: pip install tensorboard") from error
    parse: Callable[[bytes], Any] = Event.FromString
    return parse


class _Reader:
    def __init__(self, parse: Callable[[bytes], Any], progress: Callable[[float], object]) -> None:
        self._parse = parse
        self._progress = progress
        self._events = Events()
        self._singles: dict[str, _Singles] = {}
        self._layouts: list[_Layout] = []
        self._recent: list[_Layout] = []
        self._order = 0

    def read(self, data: mmap.mmap) -> None:
        view = np.frombuffer(data, np.uint8)
        try:
            self._read(data, view)
        finally:
            # The file cannot be closed while an array refers to it.
            del view

    def _read(self, data: mmap.mmap, view: Bytes) -> None:
        at = reported = 0
        row: list[_Scalar] = []
        while True:
            if not row and (size := self._try_layouts(view, at)):
                at += size
            else:
                end = _end_of_event(data, at)
                scalar = self._parse_event(data[at + _BEFORE : end - _AFTER], at, end) if end else None
                if row and (scalar is None or scalar.step != row[0].step):
                    self._finish_row(view, row)
                    row = []
                    # The next point may match a layout.
                    if scalar is not None:
                        continue
                if scalar is not None:
                    row.append(scalar)
                if not end:
                    break
                at = end
            if at - reported > _PROGRESS_EVERY:
                self._progress(at - reported)
                reported = at
                if hasattr(data, "madvise"):
                    # Release the pages that have been read.
                    data.madvise(mmap.MADV_DONTNEED, 0, at // mmap.PAGESIZE * mmap.PAGESIZE)
        self._progress(at - reported)

    def _try_layouts(self, view: Bytes, at: int) -> int:
        """Read the point at a position if it matches an earlier layout. Returns its size, or 0."""
        header = view[at : at + _BEFORE].tobytes()
        for layout in self._recent:
            # The header holds the length, which already distinguishes most events.
            if layout.header == header and layout.try_read(view, at, self._order):
                self._order += 1
                return layout.size
        return 0

    def _finish_row(self, view: Bytes, row: Sequence[_Scalar]) -> None:
        if len(row) >= _MIN_EVENTS:
            layout = _Layout(view, row)
            if layout.try_read(view, row[0].begin, self._order):
                self._order += 1
                self._layouts.append(layout)
                self._recent = [layout, *self._recent[: _LAYOUTS - 1]]
                return
        for scalar in row:
            single = self._singles.setdefault(scalar.tag, _Singles())
            single.orders.append(self._order)
            single.steps.append(scalar.step)
            single.times.append(scalar.time)
            single.values.append(scalar.value)
            self._order += 1

    def _parse_event(self, data: bytes, begin: int, end: int) -> _Scalar | None:
        """Parse an event. Returns its number if it is a plain scalar; stores or ignores anything else."""
        try:
            event = self._parse(data)
        except Exception:
            # Damaged. There are several DecodeError classes.
            return None
        if event.HasField("session_log"):
            if event.session_log.status == event.session_log.START and event.step:
                self._events.starts.append((event.step, event.wall_time))
            return None
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                scalar = _Scalar(value.tag, event.step, event.wall_time, value.simple_value, begin, end)
                if _is_plain(data, scalar) and len(event.summary.value) == 1:
                    return scalar
                self._finish_row(np.zeros(0, np.uint8), [scalar])
            elif kind == "tensor" and value.tag.endswith("/text_summary"):
                texts = self._events.texts.setdefault(value.tag.removesuffix("/text_summary"), [])
                for text in value.tensor.string_val:
                    texts.append(Text(event.step, event.wall_time, text.decode("utf-8", "replace")))
        return None

    def finish(self) -> Events:
        """Everything that was read. Tags that are written together share the arrays of steps and times."""
        sources = [layout.finish() for layout in self._layouts]
        rows: dict[str, list[tuple[int, int]]] = {}
        for at, layout in enumerate(self._layouts):
            for row, tag in enumerate(layout.tags):
                rows.setdefault(tag, []).append((at, row))
        for tag, single in self._singles.items():
            rows.setdefault(tag, []).append((len(sources), 0))
            sources.append(single.finish())
        merged: dict[tuple[int, ...], tuple[NDArray[np.intp], Points]] = {}
        for tag, parts in rows.items():
            key = tuple(at for at, _ in parts)
            if key not in merged:
                merged[key] = _merge_sources([sources[at] for at in key])
            by_order, points = merged[key]
            values = np.concatenate([sources[at][1].values[row] for at, row in parts])
            self._events.scalars[tag] = points._replace(values=values[by_order])
        return self._events


def _merge_sources(sources: Sequence[tuple[NDArray[np.int64], Points]]) -> tuple[NDArray[np.intp], Points]:
    by_order = np.argsort(np.concatenate([orders for orders, _ in sources]), kind="stable")
    steps = np.concatenate([points.steps for _, points in sources])[by_order]
    times = np.concatenate([points.times for _, points in sources])[by_order]
    return by_order, Points(steps, times, np.zeros(0, np.float32))


def _is_plain(data: bytes, scalar: _Scalar) -> bool:
    """Whether an event has the layout of SummaryWriter: time, step, and the number at its end.

    Tags of protocol buffers: 9, a double as field 1; 16, a varint as field 2; 21, a float as field 2 of the value.
    """
    step = _varint(scalar.step)
    return (
        scalar.step > 0
        and data[0] == 9
        and data[_TIME] == 16
        and data[_TIME + 1 : _TIME + 1 + len(step)] == step
        and data[-5] == 21
        and data[-4:] == struct.pack("<f", scalar.value)
    )


def _varint(number: int) -> bytes:
    """Encode an integer with 7 bits per byte, lowest first. All bytes except the last have the eighth bit set."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _end_of_event(data: mmap.mmap, at: int) -> int:
    """End of the framed event at a position; 0 if there is no complete event."""
    header = data[at : at + _BEFORE]
    if len(header) < _BEFORE:
        return 0
    length = _length(header)
    end = at + _BEFORE + length + _AFTER
    return end if length >= 0 and end <= len(data) else 0


@lru_cache(4096)
def _length(header: bytes) -> int:
    """The length in an event's header; -1 if the checksum is wrong."""
    length, checksum = struct.unpack("<QI", header)
    crc = _crc32c(header[:8])
    return length if checksum == ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF else -1


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
