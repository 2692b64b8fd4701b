"""Which numbers of which layers have a tag of their own in TensorBoard, where there are many layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from weightflip.overview import MANY_LAYERS, outliers
from weightflip.records import FlipRecord, Quotient, split_variant
from weightflip.sinks.tags import Point

LayerValues: TypeAlias = "Sequence[str] | str | None"

# What the package is asked for is there for every layer, always.
_ALWAYS = ("cumulative_flip_rate",)
# A layer has to stand out at this many logging points in a row: at the start many do for a moment.
_LASTING = 3
# So many at most get all their numbers written.
_MOST_OUTLIERS = 12


class ChosenLayers:
    """What is written of each layer, one by one.

    Args:
        layer_values: None: all numbers of up to 30 layers; of more, the cumulative flip rate of each, and all numbers
            of those that stand out. ``"all"``: all. Names: these, beside the cumulative flip rate.

    Attributes:
        are_many: Whether there are more than 30 layers.
        outliers: Layers that stand out by their flip rate, the first found first. What is one stays one, so that its
            lines have no gaps; 12 at most.
    """

    def __init__(self, layer_values: LayerValues = None) -> None:
        self._asked = layer_values
        self.are_many = False
        self.outliers: list[str] = []
        self._since: dict[str, int] = {}
        self._begun: set[str] = set()

    def look(self, record: FlipRecord) -> list[str]:
        """Take note of a record, before it is written.

        Returns:
            Those that stand out from now on.
        """
        self.are_many = len({split_variant(layer.name)[0] for layer in record.layers}) > MANY_LAYERS
        if not self.are_many:
            return []
        rates: dict[str, dict[str, Quotient]] = {}
        for layer in record.layers:
            window = layer.window
            rates.setdefault(split_variant(layer.name)[1], {})[layer.name] = Quotient(window.flips, window.weight_steps)
        found = [name for of_quantizer in rates.values() for name in outliers(of_quantizer)]
        self._since = {name: self._since.get(name, 0) + 1 for name in found}
        lasting = [name for name in found if self._since[name] >= _LASTING and name not in self.outliers]
        new = lasting[: _MOST_OUTLIERS - len(self.outliers)]
        self.outliers += new
        return new

    def has(self, value: str, layer: str) -> bool:
        """Whether a number of a layer is written under a tag of its own."""
        return self.has_all(value) or (self._asked is None and layer in self.outliers)

    def begins(self, point: Point) -> bool:
        """Whether a tag of those that are had gets its points: ``updated_fraction`` from where it is not 1 any more.

        In most models it is 1 all the time, and of the model itself this is written.
        """
        if point.value != "updated_fraction" or point.tag.startswith("flips/") or self._is_asked_for(point.value):
            return True
        if point.number < 1:
            self._begun.add(point.tag)
        return point.tag in self._begun

    def _is_asked_for(self, value: str) -> bool:
        return self._asked is not None and (self._asked == "all" or value in self._asked)

    def has_all(self, value: str) -> bool:
        """Whether every layer has it."""
        if self._asked == "all" or value in _ALWAYS:
            return True
        return not self.are_many if self._asked is None else value in self._asked
