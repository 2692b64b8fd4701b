"""Chooses which numbers of which layers get their own tag in TensorBoard if there are many layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from weightflip.overview import MANY_LAYERS, outliers
from weightflip.records import FlipRecord, Quotient, split_variant
from weightflip.sinks.tags import Point

LayerValues: TypeAlias = "Sequence[str] | str | None"

# Written for every layer, whatever the options.
_ALWAYS = ("cumulative_flip_rate",)
# A layer must stand out at this many consecutive logging points. At the start of training, many do briefly.
_MIN_STREAK = 3
_MAX_OUTLIERS = 12


class TagSelection:
    """Decides which numbers of a layer are written individually.

    Args:
        layer_values: None: all numbers for up to 30 layers; with more layers, the cumulative flip rate of each layer
            and all numbers of outliers. ``"all"``: all numbers. Names: these numbers and the cumulative flip rate.

    Attributes:
        has_many_layers: Whether there are more than 30 layers.
        outliers: At most 12 layers whose flip rate stands out, in the order in which they were found. Layers are never
            removed, so that their curves have no gaps.
    """

    def __init__(self, layer_values: LayerValues = None) -> None:
        self._layer_values = layer_values
        self.has_many_layers = False
        self.outliers: list[str] = []
        self._streaks: dict[str, int] = {}
        self._started_tags: set[str] = set()

    def update(self, record: FlipRecord) -> list[str]:
        """Process a record before it is written.

        Returns:
            New outliers.
        """
        self.has_many_layers = len({split_variant(layer.name)[0] for layer in record.layers}) > MANY_LAYERS
        if not self.has_many_layers:
            return []
        rates: dict[str, dict[str, Quotient]] = {}
        for layer in record.layers:
            window = layer.window
            rates.setdefault(split_variant(layer.name)[1], {})[layer.name] = Quotient(window.flips, window.weight_steps)
        current = [name for of_quantizer in rates.values() for name in outliers(of_quantizer)]
        self._streaks = {name: self._streaks.get(name, 0) + 1 for name in current}
        persistent = [name for name in current if self._streaks[name] >= _MIN_STREAK and name not in self.outliers]
        new = persistent[: _MAX_OUTLIERS - len(self.outliers)]
        self.outliers += new
        return new

    def is_tagged(self, value: str, layer: str) -> bool:
        """Whether a number of a layer has its own tag."""
        return self.is_tagged_everywhere(value) or (self._layer_values is None and layer in self.outliers)

    def should_write(self, point: Point) -> bool:
        """Whether to write a point of an existing tag: ``updated_fraction`` only once it has been below 1.

        In most models it is always 1, which the model-wide tag shows.
        """
        if point.value != "updated_fraction" or point.tag.startswith("flips/") or self._is_requested(point.value):
            return True
        if point.number < 1:
            self._started_tags.add(point.tag)
        return point.tag in self._started_tags

    def _is_requested(self, value: str) -> bool:
        return self._layer_values is not None and (self._layer_values == "all" or value in self._layer_values)

    def is_tagged_everywhere(self, value: str) -> bool:
        """Whether the number has a tag for every layer."""
        if self._layer_values == "all" or value in _ALWAYS:
            return True
        return not self.has_many_layers if self._layer_values is None else value in self._layer_values
