"""One record as arrays over the layers, which is faster than one object per layer."""

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

# Numerators and denominators, float64, (layers, 2). Both are 0 for a layer without the number.
Pairs: TypeAlias = "dict[str, NDArray[np.float64]]"


class IrregularRecord(ValueError):
    """The record does not have this version's format. It may be valid or damaged."""


@dataclass(frozen=True)
class RecordArrays:
    """One record.

    Attributes:
        names: Names of the layers.
        weights: int64, (layers,).
        nonfinite: int64, (layers,).
        window: Counts since the previous point, int64, (layers, counts), in the order of ``COUNTS``.
        total: Counts since tracking began, like ``window``.
        window_ratios: Counts of metric groups since the previous point, by name.
        total_ratios: Counts of metric groups since tracking began, by name.
        gauges: Values of metric groups at this point, by name.
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
    def from_record(cls, record: FlipRecord) -> RecordArrays:
        """Convert a record that was parsed with all checks."""
        layers = record.layers
        periods = [[layer.window for layer in layers], [layer.total for layer in layers]]
        rows = [[[getattr(counts, name) for name in COUNTS] for counts in period] for period in periods]
        window, total = (np.array(counts, np.int64).reshape(-1, len(COUNTS)) for counts in rows)
        window_ratios, total_ratios = (_collect_pairs([counts.ratios for counts in period]) for period in periods)
        return cls(
            tuple(layer.name for layer in layers),
            np.array([layer.weights for layer in layers], np.int64),
            np.array([layer.nonfinite for layer in layers], np.int64),
            window,
            total,
            window_ratios,
            total_ratios,
            _collect_pairs([layer.gauges for layer in layers]),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RecordArrays:
        """Convert a JSON object in the format of :meth:`FlipRecord.to_rows` or :meth:`FlipRecord.to_dict`.

        Raises:
            IrregularRecord: It has another format.
        """
        try:
            parts = _split_rows(data["rows"]) if "rows" in data else _split_layers(data["layers"])
            if not set(map(type, parts.names)) <= {str} or len(set(parts.names)) < len(parts.names):
                raise IrregularRecord
            numbers = (_to_int_matrix([numbers], len(parts.names))[0] for numbers in (parts.weights, parts.nonfinite))
            counts = [_to_int_matrix(rows, len(COUNTS)) for rows in (parts.window, parts.total)]
            if "rows" in data:
                # Convert one row of arrays: LayerRecord knows the meaning of the numbers.
                layers = LayerRecord.from_row(["", 0, *(list(matrix.T) for matrix in counts)])
                counts = [_stack_counts(period, len(parts.names)) for period in (layers.window, layers.total)]
            pairs = (_check_pairs(of) for of in (parts.window_ratios, parts.total_ratios, parts.gauges))
            return cls(tuple(parts.names), *numbers, *counts, *pairs)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise IrregularRecord from error

    def with_window(self, window: NDArray[np.int64]) -> LayerRecord:
        """All layers as one record whose fields are arrays, with another window."""
        now: dict[str, Any] = dict(zip(COUNTS, window.T, strict=True))
        ever: dict[str, Any] = dict(zip(COUNTS, self.total.T, strict=True))
        weights: Any = self.weights
        return LayerRecord("", weights, Counts(**now), Counts(**ever))


class _Parts(NamedTuple):
    """The unchecked contents of a line, one list per field."""

    names: list[Any]
    weights: list[Any]
    nonfinite: list[Any]
    window: list[Any]
    total: list[Any]
    window_ratios: list[Any]
    total_ratios: list[Any]
    gauges: list[Any]


def _split_rows(rows: Sequence[Sequence[Any]]) -> _Parts:
    if not set(map(len, rows)) <= {4, 5}:
        raise IrregularRecord
    extras = [row[4] if len(row) > 4 else {} for row in rows]
    names, weights, window, total = ([row[at] for row in rows] for at in range(4))
    ratios = ([extra.get(field, {}) for extra in extras] for field in ("window", "total", "gauges"))
    return _Parts(names, weights, [extra.get("nonfinite", 0) for extra in extras], window, total, *ratios)


def _split_layers(layers: Sequence[Mapping[str, Any]]) -> _Parts:
    window, total = ([layer[period] for layer in layers] for period in ("window", "total"))
    # Earlier versions have fewer counts.
    has_known_fields = all(layer.keys() <= _LAYER for layer in layers)
    if not has_known_fields or not all(counts.keys() <= _COUNTS for counts in window + total):
        raise IrregularRecord
    names, weights = ([layer[field] for layer in layers] for field in ("name", "weights"))
    nonfinite, gauges = [layer.get("nonfinite", 0) for layer in layers], [layer.get("gauges", {}) for layer in layers]
    counts, total_counts = ([[row.get(name, 0) for name in COUNTS] for row in period] for period in (window, total))
    ratios, total_ratios = ([row.get("ratios", {}) for row in period] for period in (window, total))
    return _Parts(names, weights, nonfinite, counts, total_counts, ratios, total_ratios, gauges)


def _to_int_matrix(rows: Sequence[Sequence[Any]], width: int) -> NDArray[np.int64]:
    """A matrix (rows, width). Shorter rows are padded with zeros."""
    if set(map(type, rows)) - {list} or set(map(type, itertools.chain.from_iterable(rows))) - {int}:
        raise IrregularRecord
    lengths = set(map(len, rows))
    if max(lengths, default=0) > width:
        raise IrregularRecord
    if lengths == {width}:
        matrix = np.array(rows, np.int64)
    else:
        matrix = np.array([[*row, *(0,) * (width - len(row))] for row in rows], np.int64).reshape(-1, width)
    if matrix.size and matrix.min() < 0:
        raise IrregularRecord
    return matrix


def _stack_counts(counts: Counts, layers: int) -> NDArray[np.int64]:
    """A matrix (layers, counts) from counts whose fields are arrays."""
    matrix = np.stack([np.broadcast_to(np.asarray(getattr(counts, name)), layers) for name in COUNTS], axis=1)
    if matrix.size and matrix.min() < 0:
        raise IrregularRecord
    return matrix


def _check_pairs(of_layers: Sequence[Mapping[str, Any]]) -> Pairs:
    numbers = [number for pairs in of_layers if pairs for pair in pairs.values() for number in pair]
    if not set(map(type, numbers)) <= {int, float}:
        raise IrregularRecord
    # Damage or non-finite weights. The parser for irregular records distinguishes them.
    if numbers and not all(-1e250 < number < 1e250 for number in numbers):
        raise IrregularRecord
    by_name = _collect_pairs(of_layers)
    if any((pairs[:, 1] < 0).any() for pairs in by_name.values()):
        raise IrregularRecord
    return by_name


def _collect_pairs(of_layers: Sequence[Mapping[str, Quotient]]) -> Pairs:
    by_name: Pairs = {}
    for at, pairs in enumerate(of_layers):
        for name, (numerator, denominator) in pairs.items():
            if name not in by_name:
                by_name[name] = np.zeros((len(of_layers), 2))
            by_name[name][at] = numerator, denominator
    return by_name
