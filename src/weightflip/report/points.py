"""Collects the points of records into series."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from weightflip.records import RunInfo, split_variant
from weightflip.report.record_arrays import COUNTS, Pairs, RecordArrays
from weightflip.report.run import Layer, Series, gauge_names


class _Numbers(NamedTuple):
    """One number of some layers at one point."""

    rows: NDArray[np.intp]
    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]


class PointTable:
    """Collects points by layer and value.

    Attributes:
        gauges: Names of the gauges in the records.
        left_out: Number of skipped points, which were not finite.
    """

    def __init__(self) -> None:
        self.gauges: dict[str, None] = {}
        self.left_out = 0
        self._rows: dict[str, int] = {}
        self._weights: dict[str, int] = {}
        self._points: dict[str, list[tuple[int, _Numbers]]] = {}
        self._last_rows: tuple[tuple[str, ...], NDArray[np.intp]] = (), np.zeros(0, np.intp)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, step: int, record: RecordArrays, before: RecordArrays | None = None, widens: bool = False) -> None:
        """Add a point.

        Args:
            step: Step of the record.
            record: The record.
            before: The record added before.
            widens: Whether records in between were skipped. Then the window starts at ``before``.
        """
        rows = self._rows_of(record.names)
        self._weights.update(zip(record.names, record.weights.tolist(), strict=True))
        self.gauges.update(dict.fromkeys(record.gauges))
        window, ratios = _widen_window(record, before) if widens else (record.window, record.window_ratios)
        for name, pairs in _named_quotients(record, window, ratios):
            numerators, denominators = pairs
            with np.errstate(all="ignore"):
                values = numerators / denominators
            has_value = (denominators != 0) & ~np.isnan(values)
            finite = has_value & np.isfinite(numerators) & np.isfinite(denominators) & np.isfinite(values)
            self.left_out += int(has_value.sum() - finite.sum())
            if finite.all():
                self._points.setdefault(name, []).append((step, _Numbers(rows, numerators, denominators)))
            elif finite.any():
                kept = _Numbers(rows[finite], numerators[finite], denominators[finite])
                self._points.setdefault(name, []).append((step, kept))
        hit = record.nonfinite > 0
        if hit.any():
            counts = _Numbers(rows[hit], record.nonfinite[hit].astype(np.float64), np.ones(int(hit.sum())))
            self._points.setdefault("nonfinite_weights", []).append((step, counts))

    def _rows_of(self, names: tuple[str, ...]) -> NDArray[np.intp]:
        """Rows of the layers. Points with the same layers share one array."""
        if names != self._last_rows[0]:
            rows = [self._rows.setdefault(name, len(self._rows)) for name in names]
            self._last_rows = names, np.array(rows, np.intp)
        return self._last_rows[1]

    def layers(self, info: RunInfo) -> dict[str, Layer]:
        """The layers with all collected points."""
        gauges = gauge_names(info)
        values: dict[str, dict[str, Series]] = {name: {} for name in self._rows}
        for value, points in self._points.items():
            for name, series in self._build_series(points, value in gauges):
                values[name][value] = series
        self._points = {}
        found = {}
        for name in self._rows:
            _, dtype, quantizer = info.tracked.get(name, ("", "", split_variant(name)[1]))
            found[name] = Layer(name, self._weights[name], dtype, quantizer, values[name])
        return found

    def _build_series(self, points: list[tuple[int, _Numbers]], gauge: bool) -> Iterator[tuple[str, Series]]:
        """One number of each layer that has it. Layers with all points share their array of steps."""
        steps = np.array([step for step, _ in points], np.int64)
        numerators, denominators = (np.zeros((len(self._rows), len(points))) for _ in range(2))
        has_value = np.zeros((len(self._rows), len(points)), bool)
        for at, (_, numbers) in enumerate(points):
            numerators[numbers.rows, at] = numbers.numerators
            denominators[numbers.rows, at] = numbers.denominators
            has_value[numbers.rows, at] = True
        for name, row in self._rows.items():
            mask = has_value[row]
            if mask.all():
                yield name, Series(steps, numerators[row], denominators[row], gauge)
            elif mask.any():
                yield name, Series(steps[mask], numerators[row][mask], denominators[row][mask], gauge)


def _named_quotients(
    record: RecordArrays, window: NDArray[np.int64], ratios: Pairs
) -> Iterator[tuple[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """All numbers of a record, by name: numerators and denominators over the layers."""
    for name, (numerators, denominators) in record.with_window(window).all_quotients.items():
        yield name, (np.asarray(numerators, np.float64), np.asarray(denominators, np.float64))
    for of_groups in ({name: ratios[name] for name in ratios if name not in record.gauges}, record.gauges):
        for name, pairs in of_groups.items():
            yield name, (pairs[:, 0], pairs[:, 1])


def _widen_window(record: RecordArrays, before: RecordArrays | None) -> tuple[NDArray[np.int64], Pairs]:
    """The window since an earlier record. A layer whose counts restarted in between keeps its own window."""
    if before is None:
        return record.total, record.total_ratios
    at = {name: row for row, name in enumerate(before.names)}
    # A new layer gets the last row, which holds zeros.
    rows = np.array([at.get(name, -1) for name in record.names], np.intp)
    window = record.total - np.concatenate([before.total, np.zeros((1, len(COUNTS)), np.int64)])[rows]
    has_restarted = (window < 0).any(axis=1)
    window[has_restarted] = record.window[has_restarted]
    ratios: Pairs = {}
    none = np.zeros((len(record.names), 2))
    for name in dict.fromkeys((*record.total_ratios, *before.total_ratios, *record.window_ratios)):
        earlier = np.concatenate([before.total_ratios.get(name, np.zeros((len(at), 2))), np.zeros((1, 2))])[rows]
        pairs = record.total_ratios.get(name, none) - earlier
        pairs[has_restarted] = record.window_ratios.get(name, none)[has_restarted]
        ratios[name] = pairs
    return window, ratios
