"""The pictures of a run, and the data that each one needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from weightflip.records import FlipRecord, Value, printable
from weightflip.sinks import heatmap, scatter

if TYPE_CHECKING:
    from weightflip.sinks.colors import Pixels


class Pictures:
    """Collects data for the pictures: heat maps of all layers over time, and a scatter plot of the last record."""

    def __init__(self) -> None:
        self._histories: dict[str, heatmap.LayerHistory] = {}
        self._spots: dict[str, list[scatter.Spot]] = {}
        self._values: dict[str, Value] = {}

    def add(self, record: FlipRecord, since: int, values: Iterable[Value]) -> None:
        """Add a record.

        Args:
            record: The record, which covers the steps after ``since``.
            since: Step of the previous record.
            values: How each number is displayed.
        """
        for value in values:
            self._values[value.name] = value
            if value.heat_map:
                self._histories.setdefault(value.name, heatmap.LayerHistory(value.name)).add(record, since)
            if value.expects and (spots := scatter.spots(record.layers, value.name)):
                self._spots[value.name] = spots

    def draw(self) -> dict[str, Pixels]:
        """Draw the pictures, by name of the value."""
        drawn = {}
        for name, history in self._histories.items():
            if history:
                drawn[name] = heatmap.draw(
                    history, printable(self._values[name].description or self._values[name].title)
                )
        for name, spots in self._spots.items():
            drawn[name] = scatter.draw(spots, printable(self._values[name].expects))
        return drawn
