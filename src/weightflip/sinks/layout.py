"""TensorBoard's Custom Scalars: which charts there are, and in which order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from weightflip.records import FlipRecord, Value, in_display_order, printable, split_variant
from weightflip.sinks.chosen import ChosenLayers
from weightflip.sinks.tags import spread_tags

_MAIN, _GROUPS, _OTHER = "weightflip", "weightflip: groups of layers", "weightflip: more"
# Numbers that differ by less look the same in a chart.
_SAME = 1e-4

Charts: TypeAlias = "dict[str, dict[str, list[str | list[str]]]]"


@dataclass
class _Numbers:
    """What a value was, of all layers and at all points."""

    count: int = 0
    low: float = math.inf
    high: float = -math.inf

    def add(self, number: float) -> None:
        self.count += 1
        self.low, self.high = min(self.low, number), max(self.high, number)

    @property
    def may_vary(self) -> bool:
        """Whether a chart of it shows anything; of a single number nobody knows."""
        return self.count == 1 or self.high - self.low > _SAME * max(abs(self.low), abs(self.high))


class Layout:
    """Finds out from records what there is to chart, and what of it varies at all."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], _Numbers] = {}
        self._quantizers: dict[str, None] = {}
        self._last: Charts = {}

    def news(self, record: FlipRecord, values: Iterable[Value], chosen: ChosenLayers) -> Charts | None:
        """The charts after one more record, as ``add_custom_scalars`` takes them; None where they are what they were.

        Args:
            record: The record.
            values: How each number is shown.
            chosen: Which layers have tags of their own.
        """
        self._quantizers.update(dict.fromkeys(split_variant(layer.name)[1] for layer in record.layers))
        for suffix, layers in (("", record.layers), ("_by_group", record.group_sums.values())):
            for layer in layers:
                for name, number in layer.values.items():
                    self._numbers.setdefault((name, suffix), _Numbers()).add(number)
        charts = self._charts(list(values), chosen)
        if charts == self._last:
            return None
        self._last = charts
        return charts

    def forget(self) -> None:
        """Nothing has been written, where a new file begins."""
        self._last = {}

    def _charts(self, values: list[Value], chosen: ChosenLayers) -> Charts:
        layout: Charts = {_MAIN: {"model": ["Multiline", ["^flips/rate", "^flips/stall_ratio"]]}}
        for suffix, of in (("", "layer"), ("_by_group", "group of layers")):
            varying = [name for (name, kind), numbers in self._numbers.items() if kind == suffix and numbers.may_vary]
            for value in in_display_order(varying, values):
                category = layout.setdefault(_GROUPS if suffix else value.chart or _OTHER, {})
                title = value.description or value.title
                charts = {f"by {of}": [f"^{re.escape(value.name)}{suffix}/.*"]}
                if chosen.are_many and not suffix:
                    title, charts = value.title, self._of_many(value.name, chosen)
                for what, tags in charts.items():
                    # Two numbers may have one title.
                    titles = (printable(f"{name}, {what}") for name in (title, value.name))
                    category[next(title for title in titles if title not in category)] = ["Multiline", tags]
        return layout

    def _of_many(self, value: str, chosen: ChosenLayers) -> dict[str, list[str]]:
        """No line for each layer, but how all of them are spread, and those that stand out."""
        charts, medians = {}, []
        for quantizer in self._quantizers:
            spread = spread_tags(value, quantizer)
            medians.append(spread["median"])
            of = f" @{quantizer}" if quantizer else ""
            charts[f"lowest, quartiles and highest layer{of}"] = [f"^{re.escape(tag)}$" for tag in spread.values()]
        if chosen.outliers:
            # Where other layers have tags, too, these alone. Else one pattern: TensorBoard shows charts of several runs
            # as one, if they are the same.
            tags = [f"^{re.escape(printable(f'{value}/{layer}'))}$" for layer in chosen.outliers]
            if not chosen.has_all(value):
                tags = [f"^{re.escape(value)}/.*"]
            charts["layers that stand out, and the median"] = [*tags, *(f"^{re.escape(tag)}$" for tag in medians)]
        return charts
