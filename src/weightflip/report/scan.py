"""Indexes JSONL files before their records are read: position of each record, and which writer wrote it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from weightflip.records import RunInfo
from weightflip.report import lines
from weightflip.report.run import Alert

_RECORD = re.compile(rb'\s*\{\s*"record"\s*:\s*\{\s*"step"\s*:\s*(\d{1,18})\s*,')
# At the end of a line.
_WRITER = re.compile(rb'"writer"\s*:\s*"([^"\\]{1,300})"\s*,\s*"time"\s*:\s*(\d{1,15}(?:\.\d{0,9})?)\s*\}\s*$')
_WRITER_LENGTH = 400


class Line(NamedTuple):
    """Position of the record of a step."""

    step: int
    file: int
    offset: int
    length: int


@dataclass
class Writer:
    """Everything one writer wrote, in order. Each opening of a file is one writer."""

    begin: float
    end: float
    contents: list[Line | RunInfo | Alert] = field(default_factory=list)


@dataclass
class Scan:
    """Index of some files, before their records are read.

    Attributes:
        paths: The files.
        writers: Writers by name. The name is empty for files of earlier versions.
        damaged: Number of lines that cannot be read.
        last_time: Time of the last line in seconds; 0 if unknown.
    """

    paths: Sequence[Path]
    writers: dict[bytes, Writer] = field(default_factory=dict)
    damaged: int = 0
    last_time: float = 0.0

    @property
    def first_step(self) -> float:
        """The lowest step of a record; infinity without records."""
        contents = (content for writer in self.writers.values() for content in writer.contents)
        return min((content.step for content in contents if isinstance(content, Line)), default=math.inf)


def scan(paths: Sequence[Path], progress: Callable[[float], object] = lambda size: None) -> Scan:
    """Index one file, or the files in a directory that belong to one training, resumed or not.

    Args:
        paths: The files.
        progress: Called with half the size of each line. Reading the records accounts for the other half.
    """
    found = Scan(paths)
    for at, path in enumerate(paths):
        writer = b""
        with path.open("rb") as file:
            offset = 0
            for line in file:
                named = _WRITER.search(line[-_WRITER_LENGTH:])
                match = _RECORD.match(line)
                content: Line | RunInfo | Alert | None = None
                if match:
                    content = Line(int(match[1]), at, offset, len(line))
                elif line.strip():
                    try:
                        content = _parse_content(lines.parse(line))
                    except lines.DamagedLine:
                        found.damaged += 1
                # A writer starts with an info line. An unknown name in any other line is damaged.
                if named and (named[1] in found.writers or isinstance(content, RunInfo)):
                    writer = named[1]
                time = float(named[2]) if named else 0.0
                if content is not None:
                    found.last_time = max(found.last_time, time)
                # Several files are ordered by time, the lines of a single file by position.
                now = float(offset) if len(paths) == 1 else time
                if content is not None:
                    current = found.writers.setdefault(writer, Writer(now, now))
                    current.contents.append(content)
                    current.end = max(current.end, now)
                offset += len(line)
                progress(len(line) / 2)
    return found


def _parse_content(data: Mapping[str, Any]) -> RunInfo | Alert | None:
    if "info" in data:
        return lines.parse_info(data["info"])
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
