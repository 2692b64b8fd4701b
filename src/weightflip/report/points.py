"""Points of records, collected into series."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from weightflip.records import RunInfo, split_variant
from weightflip.report.block import COUNTS, Block, Pairs
from weightflip.report.run import Layer, Series, gauges_of

# Numbers of every record: numerator and denominator, as names of counts.
_QUOTIENTS = {
    "flip_rate": ("flips", "weight_steps"),
    "stall_ratio": ("stalled", "updates"),
    "scale_changes": ("scale_changes", "scale_steps"),
}
_COLUMN = {name: at for at, name in enumerate(COUNTS)}


class _Numbers(NamedTuple):
    """One number of some layers, at one point."""

    rows: NDArray[np.intp]
    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]


class Table:
    """Collects points, layer by layer and value by value.

    Attributes:
        gauges: Names of the numbers that records have for gauges.
        left_out: Points that were not finite.
    """

    def __init__(self) -> None:
        self.gauges: dict[str, None] = {}
        self.left_out = 0
        self._rows: dict[str, int] = {}
        self._weights: dict[str, int] = {}
        self._points: dict[str, list[tuple[int, _Numbers]]] = {}
        self._placed: tuple[tuple[str, ...], NDArray[np.intp]] = (), np.zeros(0, np.intp)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, step: int, block: Block, before: Block | None = None, widens: bool = False) -> None:
        """Take a point.

        Args:
            step: When.
            block: What was counted.
            before: The point taken before.
            widens: Whether others between the two were left out: then the window is that since ``before``.
        """
        rows = self._places(block.names)
        self._weights.update(zip(block.names, block.weights.tolist(), strict=True))
        self.gauges.update(dict.fromkeys(block.gauges))
        window, ratios = _widened(block, before) if widens else (block.window, block.window_ratios)
        for name, pairs in _quotients(block, window, ratios):
            numerators, denominators = pairs
            with np.errstate(all="ignore"):
                values = numerators / denominators
            there = (denominators != 0) & ~np.isnan(values)
            finite = there & np.isfinite(numerators) & np.isfinite(denominators) & np.isfinite(values)
            self.left_out += int(there.sum() - finite.sum())
            if finite.all():
                self._points.setdefault(name, []).append((step, _Numbers(rows, numerators, denominators)))
            elif finite.any():
                kept = _Numbers(rows[finite], numerators[finite], denominators[finite])
                self._points.setdefault(name, []).append((step, kept))
        hit = block.nonfinite > 0
        if hit.any():
            counts = _Numbers(rows[hit], block.nonfinite[hit].astype(np.float64), np.ones(int(hit.sum())))
            self._points.setdefault("nonfinite_weights", []).append((step, counts))

    def _places(self, names: tuple[str, ...]) -> NDArray[np.intp]:
        """Rows of the layers. One array for all points that have the same."""
        if names != self._placed[0]:
            rows = [self._rows.setdefault(name, len(self._rows)) for name in names]
            self._placed = names, np.array(rows, np.intp)
        return self._placed[1]

    def layers(self, info: RunInfo) -> dict[str, Layer]:
        """All that was taken."""
        gauges = gauges_of(info)
        values: dict[str, dict[str, Series]] = {name: {} for name in self._rows}
        for value, points in self._points.items():
            for name, series in self._series(points, value in gauges):
                values[name][value] = series
        self._points = {}
        found = {}
        for name in self._rows:
            _, dtype, quantizer = info.tracked.get(name, ("", "", split_variant(name)[1]))
            found[name] = Layer(name, self._weights[name], dtype, quantizer, values[name])
        return found

    def _series(self, points: list[tuple[int, _Numbers]], gauge: bool) -> Iterator[tuple[str, Series]]:
        """One number of each layer that has it; layers that have all points share their steps."""
        steps = np.array([step for step, _ in points], np.int64)
        numerators, denominators = (np.zeros((len(self._rows), len(points))) for _ in range(2))
        there = np.zeros((len(self._rows), len(points)), bool)
        for at, (_, numbers) in enumerate(points):
            numerators[numbers.rows, at] = numbers.numerators
            denominators[numbers.rows, at] = numbers.denominators
            there[numbers.rows, at] = True
        for name, row in self._rows.items():
            mask = there[row]
            if mask.all():
                yield name, Series(steps, numerators[row], denominators[row], gauge)
            elif mask.any():
                yield name, Series(steps[mask], numerators[row][mask], denominators[row][mask], gauge)


def _quotients(
    block: Block, window: NDArray[np.int64], ratios: Pairs
) -> Iterator[tuple[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    counts = window.astype(np.float64)
    for name, (numerator, denominator) in _QUOTIENTS.items():
        yield name, (counts[:, _COLUMN[numerator]], counts[:, _COLUMN[denominator]])
        if name == "flip_rate":
            flips = block.total[:, _COLUMN["flips"]].astype(np.float64)
            yield "cumulative_flip_rate", (flips, block.weights.astype(np.float64))
    for of_groups in ({name: ratios[name] for name in ratios if name not in block.gauges}, block.gauges):
        for name, pairs in of_groups.items():
            yield name, (pairs[:, 0], pairs[:, 1])


def _widened(block: Block, before: Block | None) -> tuple[NDArray[np.int64], Pairs]:
    """The window since an earlier point, of layers of which counting was not begun anew in between."""
    if before is None:
        return block.total, block.total_ratios
    at = {name: row for row, name in enumerate(before.names)}
    # Of a layer that was not there, the last row: zeros.
    rows = np.array([at.get(name, -1) for name in block.names], np.intp)
    window = block.total - np.concatenate([before.total, np.zeros((1, len(COUNTS)), np.int64)])[rows]
    anew = (window < 0).any(axis=1)
    window[anew] = block.window[anew]
    ratios: Pairs = {}
    none = np.zeros((len(block.names), 2))
    for name in dict.fromkeys((*block.total_ratios, *before.total_ratios, *block.window_ratios)):
        earlier = np.concatenate([before.total_ratios.get(name, np.zeros((len(at), 2))), np.zeros((1, 2))])[rows]
        pairs = block.total_ratios.get(name, none) - earlier
        pairs[anew] = block.window_ratios.get(name, none)[anew]
        ratios[name] = pairs
    return window, ratios
