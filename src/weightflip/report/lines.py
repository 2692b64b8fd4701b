"""Parses lines of a JSONL file with all checks. Any damage raises :class:`DamagedLine`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, get_args

from weightflip.records import Counts, FlipRecord, Kind, Quotient, RunInfo, Unit, Value
from weightflip.report.record_arrays import IrregularRecord, RecordArrays

# Limits of counts and steps, and of the sums of metric groups, which must stay finite when added.
_COUNT_LIMIT, _SUM_LIMIT = 2**63, 1e250


class DamagedLine(ValueError):
    """The line is incomplete, was modified, or comes from another program."""


def parse(line: bytes) -> dict[str, Any]:
    """Parse the JSON object in a line.

    Raises:
        DamagedLine: The line holds no JSON object.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DamagedLine from error
    if not isinstance(data, dict):
        raise DamagedLine
    return data


def parse_record(line: bytes, step: int) -> RecordArrays:
    """Parse the record in a line.

    Args:
        line: A line that begins with a record of this step.
        step: Number of optimizer steps.

    Raises:
        DamagedLine: The line holds no record, or impossible numbers.
    """
    data = parse(line).get("record")
    try:
        if isinstance(data, dict) and data.get("step") == step:
            return RecordArrays.from_json(data)
    except IrregularRecord:
        # Written by an earlier version, or damaged: check each number.
        pass
    return RecordArrays.from_record(_parse_irregular(data, step))


def _parse_irregular(data: Any, step: int) -> FlipRecord:
    try:
        record = FlipRecord.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedLine from error
    names = [layer.name for layer in record.layers]
    if record.step != step or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise DamagedLine
    for layer in record.layers:
        counts = [layer.weights, layer.nonfinite]
        pairs = dict(layer.gauges)
        for period in (layer.window, layer.total):
            counts += _counts(period)
            _check_pairs(period.ratios)
        _check_pairs(pairs)
        if not all(type(count) is int and 0 <= count < _COUNT_LIMIT for count in counts):
            raise DamagedLine
    return record


def _counts(counts: Counts) -> list[Any]:
    return [number for name, number in vars(counts).items() if name != "ratios"]


def _check_pairs(pairs: Mapping[Any, Quotient]) -> None:
    for pair in pairs.values():
        for number in pair:
            # A non-finite number means that weights are not finite, not that the line is damaged.
            if type(number) not in (int, float) or (not _is_nonfinite(number) and abs(number) > _SUM_LIMIT):
                raise DamagedLine
        if pair.denominator < 0:
            raise DamagedLine


def _is_nonfinite(number: float) -> bool:
    return isinstance(number, float) and not math.isfinite(number)


def parse_info(data: Any) -> RunInfo:
    """Parse what is tracked.

    Raises:
        DamagedLine: The data is not a valid ``RunInfo``.
    """
    try:
        tracked = {name: (str(row[0]), str(row[1]), str(row[2])) for name, row in data.get("tracked", {}).items()}
        skipped, settings = dict(data.get("skipped", {})), dict(data.get("settings", {}))
        notes, values = tuple(data.get("notes", ())), tuple(map(parse_value, data.get("values", ())))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedLine from error
    texts = (*skipped.values(), *settings.values(), *notes)
    if not all(isinstance(text, str) for text in texts):
        raise DamagedLine
    return RunInfo(tracked, skipped, settings, notes, values=values)


# Type or allowed values of each attribute. Attributes added by a later version are ignored.
_VALUE = {
    "name": str,
    "kind": get_args(Kind),
    "title": str,
    "description": str,
    "unit": get_args(Unit),
    "chart": str,
    "order": int,
    "heat_map": bool,
    "expects": str,
}


def parse_value(data: Any) -> Value:
    """Parse the description of a number.

    Raises:
        DamagedLine: The data is not a valid ``Value``.
    """
    if not isinstance(data, dict) or "name" not in data:
        raise DamagedLine
    for name, expected in _VALUE.items():
        attribute = data.get(name)
        is_valid = attribute in expected if isinstance(expected, tuple) else type(attribute) is expected
        if name in data and not is_valid:
            raise DamagedLine
    return Value(**{name: data[name] for name in _VALUE if name in data})
