"""How the numbers of all layers together went, from one record to the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from weightflip.records import LayerRecord, Quotient, split_variant

# Of more, neighbours are added up.
_MOST_POINTS = 200


class Point(NamedTuple):
    """What was counted up to one record, since the one before it."""

    step: int
    flips: int
    weight_steps: int
    stalled: int
    updates: int

    def and_then(self, later: Point) -> Point:
        """Both as one."""
        return Point(later.step, *(a + b for a, b in zip(self[1:], later[1:], strict=True)))


class Course:
    """The numbers of all layers together at each record: 200 points at most, of a long run for several records each."""

    def __init__(self) -> None:
        self._points: dict[str, list[Point]] = {}

    def add(self, step: int, layers: Iterable[LayerRecord]) -> None:
        """Go on with another record."""
        found: dict[str, Point] = {}
        for layer in layers:
            window = layer.window
            here = Point(step, window.flips, window.weight_steps, window.stalled, window.updates)
            seen_as = split_variant(layer.name)[1]
            found[seen_as] = found[seen_as].and_then(here) if seen_as in found else here
        for seen_as, point in found.items():
            if not point.weight_steps:
                continue
            points = self._points.setdefault(seen_as, [])
            points.append(point)
            if len(points) > _MOST_POINTS:
                # An odd one at the end stays as it is.
                pairs = [a.and_then(b) for a, b in zip(points[::2], points[1::2], strict=False)]
                self._points[seen_as] = pairs + points[2 * len(pairs) :]

    def flip_rates(self) -> dict[str, list[tuple[float, float]]]:
        """Steps and flip rates, by the quantizer's name, which is empty where there is but one."""
        return {
            name: [(point.step, Quotient(point.flips, point.weight_steps).value) for point in points]
            for name, points in self._points.items()
        }

    def stall_ratios(self) -> dict[str, list[tuple[float, float]]]:
        """Steps and stall ratios; NaN where there were no updates."""
        return {
            name: [(point.step, Quotient(point.stalled, point.updates).value) for point in points]
            for name, points in self._points.items()
        }
