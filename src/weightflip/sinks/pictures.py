"""Which pictures there are of a training, and what each is drawn from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from weightflip.records import FlipRecord, Value, printable
from weightflip.sinks import heatmap, scatter

if TYPE_CHECKING:
    from weightflip.sinks.colours import Pixels


class Pictures:
    """Keeps of the records what the pictures show: all layers over time, and the last point's step sizes."""

    def __init__(self) -> None:
        self._histories: dict[str, heatmap.History] = {}
        self._spots: dict[str, list[scatter.Spot]] = {}
        self._values: dict[str, Value] = {}

    def add(self, record: FlipRecord, since: int, values: Iterable[Value]) -> None:
        """Take the record of the steps after ``since``.

        Args:
            record: The record.
            since: The step of the record before.
            values: How each number is shown.
        """
        for value in values:
            self._values[value.name] = value
            if value.heat_map:
                self._histories.setdefault(value.name, heatmap.History(value.name)).add(record, since)
            if value.expects and (spots := scatter.spots(record.layers, value.name)):
                self._spots[value.name] = spots

    def draw(self) -> dict[str, Pixels]:
        """The pictures, by the name of the value."""
        drawn = {}
        for name, history in self._histories.items():
            if history:
                drawn[name] = heatmap.draw(
                    history, printable(self._values[name].description or self._values[name].title)
                )
        for name, spots in self._spots.items():
            drawn[name] = scatter.draw(spots, printable(self._values[name].expects))
        return drawn
