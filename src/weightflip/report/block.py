"""All layers of one record as arrays: a number of each layer, and not an object of each number."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from weightflip.records import Counts, FlipRecord, LayerRecord, Quotient

_LAYER = {field.name for field in fields(LayerRecord)}
_COUNTS = {field.name for field in fields(Counts)}
COUNTS = tuple(field.name for field in fields(Counts) if field.name != "ratios")

# Numerators and denominators, float64, (layers, 2); both 0 where a layer has none.
Pairs: TypeAlias = "dict[str, NDArray[np.float64]]"


class IrregularRecord(ValueError):
    """Not as this version writes it: it may be whole, or not."""


@dataclass(frozen=True)
class Block:
    """One record.

    Attributes:
        names: Of the layers.
        weights: int64, (layers,).
        nonfinite: int64, (layers,).
        window: Since the point before, int64, (layers, counts), in the order of ``COUNTS``.
        total: Since tracking began, like ``window``.
        window_ratios: What metric groups counted, by name.
        total_ratios: The same, since tracking began.
        gauges: What they found at this point, by name.
    """

    names: tuple[str, ...]
    weights: NDArray[np.int64]
    nonfinite: NDArray[np.int64]
    window: NDArray[np.int64]
    total: NDArray[np.int64]
    window_ratios: Pairs
    total_ratios: Pairs
    gauges: Pairs

    @classmethod
    def of(cls, record: FlipRecord) -> Block:
        """Of a record that was read with all checks."""
        layers = record.layers
        periods = [[layer.window for layer in layers], [layer.total for layer in layers]]
        window, total = (
            np.array([[getattr(counts, name) for name in COUNTS] for counts in period], np.int64).reshape(-1, 6)
            for period in periods
        )
        window_ratios, total_ratios = (_pairs([counts.ratios for counts in period]) for period in periods)
        return cls(
            tuple(layer.name for layer in layers),
            np.array([layer.weights for layer in layers], np.int64),
            np.array([layer.nonfinite for layer in layers], np.int64),
            window,
            total,
            window_ratios,
            total_ratios,
            _pairs([layer.gauges for layer in layers]),
        )

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Block:
        """Of the object in a line, if it is as :meth:`FlipRecord.to_rows` or :meth:`FlipRecord.to_dict` has it.

        Raises:
            IrregularRecord: It is not.
        """
        try:
            parts = _of_rows(data["rows"]) if "rows" in data else _of_layers(data["layers"])
            if not set(map(type, parts.names)) <= {str} or len(set(parts.names)) < len(parts.names):
                raise IrregularRecord
            numbers = (_integers([numbers], len(parts.names))[0] for numbers in (parts.weights, parts.nonfinite))
            counts = (_integers(rows, len(COUNTS)) for rows in (parts.window, parts.total))
            pairs = (_checked_pairs(of) for of in (parts.window_ratios, parts.total_ratios, parts.gauges))
            return cls(tuple(parts.names), *numbers, *counts, *pairs)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise IrregularRecord from error


class _Parts(NamedTuple):
    """What a line holds, number by number, unchecked."""

    names: list[Any]
    weights: list[Any]
    nonfinite: list[Any]
    window: list[Any]
    total: list[Any]
    window_ratios: list[Any]
    total_ratios: list[Any]
    gauges: list[Any]


def _of_rows(rows: Sequence[Sequence[Any]]) -> _Parts:
    if not set(map(len, rows)) <= {4, 5}:
        raise IrregularRecord
    more = [row[4] if len(row) > 4 else {} for row in rows]
    names, weights, window, total = ([row[at] for row in rows] for at in range(4))
    ratios = ([content.get(of, {}) for content in more] for of in ("window", "total", "gauges"))
    return _Parts(names, weights, [content.get("nonfinite", 0) for content in more], window, total, *ratios)


def _of_layers(layers: Sequence[Mapping[str, Any]]) -> _Parts:
    window, total = ([layer[of] for layer in layers] for of in ("window", "total"))
    if any(layer.keys() != _LAYER for layer in layers) or any(period.keys() != _COUNTS for period in window + total):
        raise IrregularRecord
    names, weights, nonfinite, gauges = (
        [layer[of] for layer in layers] for of in ("name", "weights", "nonfinite", "gauges")
    )
    counts, total_counts = ([[period[name] for name in COUNTS] for period in periods] for periods in (window, total))
    ratios, total_ratios = ([period["ratios"] for period in periods] for periods in (window, total))
    return _Parts(names, weights, nonfinite, counts, total_counts, ratios, total_ratios, gauges)


def _integers(rows: Sequence[Sequence[Any]], width: int) -> NDArray[np.int64]:
    """(rows, width) of rows that may be shorter: then zeros follow."""
    if set(map(type, rows)) - {list} or set(map(type, itertools.chain.from_iterable(rows))) - {int}:
        raise IrregularRecord
    lengths = set(map(len, rows))
    if max(lengths, default=0) > width:
        raise IrregularRecord
    if lengths == {width}:
        found = np.array(rows, np.int64)
    else:
        found = np.array([[*row, *(0,) * (width - len(row))] for row in rows], np.int64).reshape(-1, width)
    if found.size and found.min() < 0:
        raise IrregularRecord
    return found


def _checked_pairs(of_layers: Sequence[Mapping[str, Any]]) -> Pairs:
    numbers = [number for pairs in of_layers if pairs for pair in pairs.values() for number in pair]
    if not set(map(type, numbers)) <= {int, float}:
        raise IrregularRecord
    # Damage, or weights that are not finite: the checks of one number at a time tell.
    if numbers and not all(-1e250 < number < 1e250 for number in numbers):
        raise IrregularRecord
    found = _pairs(of_layers)
    if any((pairs[:, 1] < 0).any() for pairs in found.values()):
        raise IrregularRecord
    return found


def _pairs(of_layers: Sequence[Mapping[str, Quotient]]) -> Pairs:
    found: Pairs = {}
    for at, pairs in enumerate(of_layers):
        for name, (numerator, denominator) in pairs.items():
            if name not in found:
                found[name] = np.zeros((len(of_layers), 2))
            found[name][at] = numerator, denominator
    return found
