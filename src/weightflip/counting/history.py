"""The numbers of all layers together over time, one point per record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from weightflip.records import LayerRecord, Quotient, split_variant

# With more points, adjacent ones are merged.
_MAX_POINTS = 200


class Point(NamedTuple):
    """The counts in the window of one record."""

    step: int
    flips: int
    weight_steps: int
    stalled: int
    updates: int

    def merged_with(self, later: Point) -> Point:
        """Merge this point with the next one."""
        return Point(later.step, *(a + b for a, b in zip(self[1:], later[1:], strict=True)))


class History:
    """The numbers of all layers together over time, in at most 200 points. In long runs, a point is several records."""

    def __init__(self) -> None:
        self._points: dict[str, list[Point]] = {}

    def add(self, step: int, layers: Iterable[LayerRecord]) -> None:
        """Add a record."""
        found: dict[str, Point] = {}
        for layer in layers:
            window = layer.window
            point = Point(step, window.flips, window.weight_steps, window.stalled, window.updates)
            quantizer = split_variant(layer.name)[1]
            found[quantizer] = found[quantizer].merged_with(point) if quantizer in found else point
        for quantizer, point in found.items():
            if not point.weight_steps:
                continue
            points = self._points.setdefault(quantizer, [])
            points.append(point)
            if len(points) > _MAX_POINTS:
                # An unpaired point at the end stays as it is.
                pairs = [a.merged_with(b) for a, b in zip(points[::2], points[1::2], strict=False)]
                self._points[quantizer] = pairs + points[2 * len(pairs) :]

    def flip_rates(self) -> dict[str, list[tuple[float, float]]]:
        """Return steps and flip rates by the quantizer's name, which is empty if layers have only one."""
        return {
            name: [(point.step, Quotient(point.flips, point.weight_steps).value) for point in points]
            for name, points in self._points.items()
        }

    def stall_ratios(self) -> dict[str, list[tuple[float, float]]]:
        """Return steps and stall ratios, as in ``flip_rates``; NaN without updates."""
        return {
            name: [(point.step, Quotient(point.stalled, point.updates).value) for point in points]
            for name, points in self._points.items()
        }
