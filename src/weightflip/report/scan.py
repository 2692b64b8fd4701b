"""What JSONL files hold, before their records are read: where each is, and which opening of the file wrote it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from weightflip.records import RunInfo
from weightflip.report import lines
from weightflip.report.run import Alert

_RECORD = re.compile(rb'\s*\{\s*"record"\s*:\s*\{\s*"step"\s*:\s*(\d{1,18})\s*,')
# At the end of a line, which it closes.
_WRITER = re.compile(rb'"writer"\s*:\s*"([^"\\]{1,300})"\s*,\s*"time"\s*:\s*(\d{1,15}(?:\.\d{0,9})?)\s*\}\s*$')
_WRITER_ROOM = 400


class Line(NamedTuple):
    """Where the record of a step is."""

    step: int
    file: int
    offset: int
    length: int


@dataclass
class Writer:
    """What one opening of a file has written, in order."""

    begin: float
    end: float
    contents: list[Line | RunInfo | Alert] = field(default_factory=list)


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
    writers: dict[bytes, Writer] = field(default_factory=dict)
    damaged: int = 0
    last_time: float = 0.0

    @property
    def first_step(self) -> float:
        """The lowest step of a record; infinite without one."""
        contents = (content for writer in self.writers.values() for content in writer.contents)
        return min((content.step for content in contents if isinstance(content, Line)), default=math.inf)


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
                content: Line | RunInfo | Alert | None = None
                if match:
                    content = Line(int(match[1]), at, offset, len(line))
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
                    of = found.writers.setdefault(writer, Writer(now, now))
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


def _alert_from_dict(data: Any) -> Alert:
    if not isinstance(data, dict):
        raise lines.DamagedLine
    step = data.get("step") or 0
    if type(step) is not int or not 0 <= step < 2**63:
        raise lines.DamagedLine
    layer, rule, message = (str(data.get(name, "")) for name in ("layer", "rule", "message"))
    return Alert(step, layer, rule, message)
