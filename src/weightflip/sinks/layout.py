"""The layout of TensorBoard's Custom Scalars dashboard: the charts and their order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from weightflip.records import FlipRecord, Value, in_display_order, printable, split_variant
from weightflip.sinks.tag_selection import TagSelection
from weightflip.sinks.tags import spread_tags

_MAIN, _GROUPS, _OTHER = "weightflip", "weightflip: groups of layers", "weightflip: more"
# A smaller relative difference is invisible in a chart.
_MIN_VARIATION = 1e-4

Charts: TypeAlias = "dict[str, dict[str, list[str | list[str]]]]"


@dataclass
class _ValueRange:
    """The range of a value over all layers and logging points."""

    count: int = 0
    low: float = math.inf
    high: float = -math.inf

    def add(self, number: float) -> None:
        self.count += 1
        self.low, self.high = min(self.low, number), max(self.high, number)

    @property
    def may_vary(self) -> bool:
        """Whether the value varies, or has only one number so far."""
        return self.count == 1 or self.high - self.low > _MIN_VARIATION * max(abs(self.low), abs(self.high))


class Layout:
    """Builds the layout from the values that occur in records and vary."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[str, str], _ValueRange] = {}
        self._quantizers: dict[str, None] = {}
        self._last: Charts = {}

    def update(self, record: FlipRecord, values: Iterable[Value], selection: TagSelection) -> Charts | None:
        """Add a record and return the new layout for ``add_custom_scalars``; None if it has not changed.

        Args:
            record: The record.
            values: How each number is displayed.
            selection: Which layers have their own tags.
        """
        self._quantizers.update(dict.fromkeys(split_variant(layer.name)[1] for layer in record.layers))
        for suffix, layers in (("", record.layers), ("_by_group", record.group_sums.values())):
            for layer in layers:
                for name, number in layer.values.items():
                    self._ranges.setdefault((name, suffix), _ValueRange()).add(number)
        charts = self._build_charts(list(values), selection)
        if charts == self._last:
            return None
        self._last = charts
        return charts

    def forget(self) -> None:
        """Forget the last layout, so that it is written again to a new file."""
        self._last = {}

    def _build_charts(self, values: list[Value], selection: TagSelection) -> Charts:
        layout: Charts = {_MAIN: {"model": ["Multiline", ["^flips/rate", "^flips/stall_ratio"]]}}
        for suffix, kind in (("", "layer"), ("_by_group", "group of layers")):
            varying = [
                name for (name, ending), numbers in self._ranges.items() if ending == suffix and numbers.may_vary
            ]
            for value in in_display_order(varying, values):
                category = layout.setdefault(_GROUPS if suffix else value.chart or _OTHER, {})
                title = value.description or value.title
                charts = {f"by {kind}": [f"^{re.escape(value.name)}{suffix}/.*"]}
                if selection.has_many_layers and not suffix:
                    title, charts = value.title, self._charts_of_many_layers(value.name, selection)
                for what, tags in charts.items():
                    # Two numbers may have the same title.
                    titles = (printable(f"{name}, {what}") for name in (title, value.name))
                    category[next(title for title in titles if title not in category)] = ["Multiline", tags]
        return layout

    def _charts_of_many_layers(self, value: str, selection: TagSelection) -> dict[str, list[str]]:
        """The spread over all layers, and the outliers, instead of one line per layer."""
        charts, medians = {}, []
        for quantizer in self._quantizers:
            spread = spread_tags(value, quantizer)
            medians.append(spread["median"])
            of = f" @{quantizer}" if quantizer else ""
            charts[f"lowest, quartiles and highest layer{of}"] = [f"^{re.escape(tag)}$" for tag in spread.values()]
        if selection.outliers:
            # Name the outliers if other layers have tags too. Otherwise use one pattern for all runs: TensorBoard
            # merges identical charts of several runs.
            tags = [f"^{re.escape(printable(f'{value}/{layer}'))}$" for layer in selection.outliers]
            if not selection.is_tagged_everywhere(value):
                tags = [f"^{re.escape(value)}/.*"]
            charts["layers that stand out, and the median"] = [*tags, *(f"^{re.escape(tag)}$" for tag in medians)]
        return charts
