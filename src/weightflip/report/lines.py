"""Lines of a JSONL file, checked: whatever a damaged one holds, it is said to be damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, get_args

from weightflip.records import Counts, FlipRecord, Kind, Quotient, RunInfo, Unit, Value
from weightflip.report.block import Block, IrregularRecord

# Of counts and steps; and of what metric groups sum up, so that sums of it are finite.
_COUNT_LIMIT, _SUM_LIMIT = 2**63, 1e250


class DamagedLine(ValueError):
    """Torn, changed afterwards, or of another program."""


def parse(line: bytes) -> dict[str, Any]:
    """The object in a line.

    Raises:
        DamagedLine: There is none.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DamagedLine from error
    if not isinstance(data, dict):
        raise DamagedLine
    return data


def block_of(line: bytes, step: int) -> Block:
    """The record in a line.

    Args:
        line: It begins with a record of this step.
        step: Optimizer steps.

    Raises:
        DamagedLine: It is none, or one with numbers that no training counts.
    """
    data = parse(line).get("record")
    try:
        if isinstance(data, dict) and data.get("step") == step:
            return Block.of_json(data)
    except IrregularRecord:
        # An earlier version's, or damaged: each number is looked at.
        pass
    return Block.of(_record_of(data, step))


def _record_of(data: Any, step: int) -> FlipRecord:
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
            # One that is not finite is damage of the weights, and not of the line.
            if type(number) not in (int, float) or (not _is_nonfinite(number) and abs(number) > _SUM_LIMIT):
                raise DamagedLine
        if pair.denominator < 0:
            raise DamagedLine


def _is_nonfinite(number: float) -> bool:
    return isinstance(number, float) and not math.isfinite(number)


def info_of(data: Any) -> RunInfo:
    """What is tracked.

    Raises:
        DamagedLine: Not as ``RunInfo`` is written.
    """
    try:
        tracked = {name: (str(row[0]), str(row[1]), str(row[2])) for name, row in data.get("tracked", {}).items()}
        skipped, settings = dict(data.get("skipped", {})), dict(data.get("settings", {}))
        notes, values = tuple(data.get("notes", ())), tuple(map(value_of, data.get("values", ())))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedLine from error
    texts = (*skipped.values(), *settings.values(), *notes)
    if not all(isinstance(text, str) for text in texts):
        raise DamagedLine
    return RunInfo(tracked, skipped, settings, notes, values=values)


# What each attribute of a value may be; one that a later version adds is left out.
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


def value_of(data: Any) -> Value:
    """How a number is shown.

    Raises:
        DamagedLine: Not as ``Value`` is written.
    """
    if not isinstance(data, dict) or "name" not in data:
        raise DamagedLine
    for name, may_be in _VALUE.items():
        found = data.get(name)
        is_one = found in may_be if isinstance(may_be, tuple) else type(found) is may_be
        if name in data and not is_one:
            raise DamagedLine
    return Value(**{name: data[name] for name in _VALUE if name in data})
