"""TensorBoard's event files: scalars as arrays, and texts.

TensorBoard's own reader makes an object of each number, and checks each in Python: a minute for a million of them. A
training writes the same tags at each logging point, in the same order, so that the bytes of one point are those of the
point before, but for step, times, numbers and checksums. The first one is parsed and kept as a *layout*; those that fit
it are read as one array. Whatever fits none is parsed event by event.
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

# Scalars of one step in a row that are worth a layout, and how many layouts are tried.
_EVENTS_ALIKE = 16
_LAYOUTS = 8
# Bytes that are compared first.
_HEAD = 1024
# Bytes from one word on the progress to the next.
_TOLD_EVERY = 1 << 23
# An event is framed by its length (8 bytes) with a checksum (4) before it, and its own checksum (4) after it.
_BEFORE, _AFTER = 12, 4
_TIME = 9
_MASK_DELTA = 0xA282EAD8

Bytes = NDArray[np.uint8]


class Points(NamedTuple):
    """One tag over time, in the order of the files. Tags that are written together share their steps and times.

    Attributes:
        steps: int64, (points,).
        times: Seconds, float64, (points,).
        values: float32, (points,).
    """

    steps: NDArray[np.int64]
    times: NDArray[np.float64]
    values: NDArray[np.float32]


class Text(NamedTuple):
    """What was written to a text panel."""

    step: int
    time: float
    text: str


@dataclass
class Events:
    """What some files hold.

    Attributes:
        scalars: By tag.
        texts: By tag.
        starts: Step and time from which on a writer has asked to hide what was there before.
    """

    scalars: dict[str, Points] = field(default_factory=dict)
    texts: dict[str, list[Text]] = field(default_factory=dict)
    starts: list[tuple[int, float]] = field(default_factory=list)


class _Scalar(NamedTuple):
    """An event of one number, with its number at its end."""

    tag: str
    step: int
    time: float
    value: float
    begin: int
    end: int


class _Layout:
    """Events of one step in a row: where their times, steps and numbers are. Takes the points that are laid out so."""

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
        self._header = data[begin : begin + _BEFORE].tobytes()
        self._like = data[begin : begin + self.size] & mask
        self._numbers: list[NDArray[np.float32]] = []
        self._points: list[tuple[int, int, float]] = []

    def take(self, data: Bytes, begin: int, order: int) -> bool:
        """Read a point, if it begins here and is laid out like this."""
        if data[begin : begin + _BEFORE].tobytes() != self._header:
            return False
        found = data[begin : begin + self.size]
        if len(found) < self.size or not self._fits(found):
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

    def _fits(self, found: Bytes) -> bool:
        for part in (slice(None, _HEAD), slice(_HEAD, None)):
            if not np.array_equal(found[part] & self._mask[part], self._like[part]):
                return False
        return True

    def close(self) -> tuple[NDArray[np.int64], Points]:
        """The places of the points in the order of the files, and what was read; values are (tags, points)."""
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

    def close(self) -> tuple[NDArray[np.int64], Points]:
        steps, times, values = (np.array(part) for part in (self.steps, self.times, self.values))
        return np.array(self.orders), Points(steps, times, values[None])


def read(paths: Sequence[Path], progress: Callable[[int], object] = lambda size: None) -> Events:
    """Scalars and texts of some event files, one after the other.

    A file is read up to the first place that is torn, as it is where the training was killed or is still writing.

    Args:
        paths: The files, in the order in which they were begun.
        progress: Called with a number of bytes, each time that so many more are read.

    Raises:
        ReportError: The tensorboard package is missing.
    """
    reader = _Reader(_event_parser(), progress)
    for path in paths:
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                reader.read(data)
    return reader.close()


def _event_parser() -> Callable[[bytes], Any]:
    try:
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError as error:
        raise ReportError("reading event files needs the tensorboard package: pip install tensorboard") from error
    parse: Callable[[bytes], Any] = Event.FromString
    return parse


class _Reader:
    def __init__(self, parse: Callable[[bytes], Any], progress: Callable[[int], object]) -> None:
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
            # The file cannot be closed while an array looks at it.
            del view

    def _read(self, data: mmap.mmap, view: Bytes) -> None:
        at = told = 0
        row: list[_Scalar] = []
        while True:
            if not row and (taken := self._take(view, at)):
                at += taken
            else:
                end = _end_of_event(data, at)
                scalar = self._scalar_or_other(data[at + _BEFORE : end - _AFTER], at, end) if end else None
                if row and (scalar is None or scalar.step != row[0].step):
                    self._close_row(view, row)
                    row = []
                    # The next point may fit a layout.
                    if scalar is not None:
                        continue
                if scalar is not None:
                    row.append(scalar)
                if not end:
                    break
                at = end
            if at - told > _TOLD_EVERY:
                self._progress(at - told)
                told = at
                if hasattr(data, "madvise"):
                    # Pages of the file that are done with are not ours to keep in memory.
                    data.madvise(mmap.MADV_DONTNEED, 0, at // mmap.PAGESIZE * mmap.PAGESIZE)
        self._progress(at - told)

    def _take(self, view: Bytes, at: int) -> int:
        """The size of the point that begins here, if it is laid out like an earlier one; else 0."""
        for layout in self._recent:
            if layout.take(view, at, self._order):
                self._order += 1
                return layout.size
        return 0

    def _close_row(self, view: Bytes, row: Sequence[_Scalar]) -> None:
        if len(row) >= _EVENTS_ALIKE:
            layout = _Layout(view, row)
            if layout.take(view, row[0].begin, self._order):
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

    def _scalar_or_other(self, data: bytes, begin: int, end: int) -> _Scalar | None:
        """The number in an event; anything else in it is kept, or left out."""
        try:
            event = self._parse(data)
        except Exception:
            # DecodeError, of which there are several: damaged.
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
                self._close_row(np.zeros(0, np.uint8), [scalar])
            elif kind == "tensor" and value.tag.endswith("/text_summary"):
                texts = self._events.texts.setdefault(value.tag.removesuffix("/text_summary"), [])
                for text in value.tensor.string_val:
                    texts.append(Text(event.step, event.wall_time, text.decode("utf-8", "replace")))
        return None

    def close(self) -> Events:
        """All that was read. Of tags that are written together, steps and times are the same arrays."""
        sources = [layout.close() for layout in self._layouts]
        rows: dict[str, list[tuple[int, int]]] = {}
        for at, layout in enumerate(self._layouts):
            for row, tag in enumerate(layout.tags):
                rows.setdefault(tag, []).append((at, row))
        for tag, single in self._singles.items():
            rows.setdefault(tag, []).append((len(sources), 0))
            sources.append(single.close())
        together: dict[tuple[int, ...], tuple[NDArray[np.intp], Points]] = {}
        for tag, parts in rows.items():
            key = tuple(at for at, _ in parts)
            if key not in together:
                together[key] = _in_order([sources[at] for at in key])
            by_order, points = together[key]
            values = np.concatenate([sources[at][1].values[row] for at, row in parts])
            self._events.scalars[tag] = points._replace(values=values[by_order])
        return self._events


def _in_order(sources: Sequence[tuple[NDArray[np.int64], Points]]) -> tuple[NDArray[np.intp], Points]:
    by_order = np.argsort(np.concatenate([orders for orders, _ in sources]), kind="stable")
    steps = np.concatenate([points.steps for _, points in sources])[by_order]
    times = np.concatenate([points.times for _, points in sources])[by_order]
    return by_order, Points(steps, times, np.zeros(0, np.float32))


def _is_plain(data: bytes, scalar: _Scalar) -> bool:
    """Whether an event is laid out as SummaryWriter does it: time, step, and the number at its end.

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
    """7 bits a byte, the lowest first; all but the last have an eighth bit."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def _end_of_event(data: mmap.mmap, at: int) -> int:
    """Where the event that begins at a place ends, with its frame; 0 where there is no whole one."""
    header = data[at : at + _BEFORE]
    if len(header) < _BEFORE:
        return 0
    length = _length(header)
    end = at + _BEFORE + length + _AFTER
    return end if length >= 0 and end <= len(data) else 0


@lru_cache(4096)
def _length(header: bytes) -> int:
    """The length in an event's header; negative where the checksum is another."""
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
