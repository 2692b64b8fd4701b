"""TensorBoard's Custom Scalars: which charts there are, and in which order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightflip.records import FlipRecord, Value, shown, shown_as, split_variant
from weightflip.sinks.chosen import ChosenLayers
from weightflip.sinks.tags import spread_tag

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

_MAIN, _GROUPS, _OTHER = "weightflip", "weightflip: groups of layers", "weightflip: more"
# Numbers that differ by less look the same in a chart.
_SAME = 1e-4


@dataclass
class Chart:
    """One chart.

    Attributes:
        tags: Patterns of the tags whose lines it has.
        bands: Tags of a middle line and the borders of a band around it, instead of ``tags``.
    """

    tags: list[str] = field(default_factory=list)
    bands: list[tuple[str, str, str]] = field(default_factory=list)


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
        self._known: object = None

    def news(self, record: FlipRecord, values: Iterable[Value], chosen: ChosenLayers) -> Summary | None:
        """The charts after one more record; None where they are what they were."""
        self._quantizers.update(dict.fromkeys(split_variant(layer.name)[1] for layer in record.layers))
        for suffix, layers in (("", record.layers), ("_by_group", record.group_sums.values())):
            for layer in layers:
                for name, number in layer.values.items():
                    self._numbers.setdefault((name, suffix), _Numbers()).add(number)
        varying = {key for key, numbers in self._numbers.items() if numbers.may_vary}
        known = (varying, tuple(self._quantizers), chosen.are_many, tuple(chosen.outliers))
        if known == self._known:
            return None
        self._known = known
        return _summary(self._charts(varying, list(values), chosen))

    def forget(self) -> None:
        """Nothing has been written, where a new file begins."""
        self._known = None

    def _charts(
        self, varying: set[tuple[str, str]], values: list[Value], chosen: ChosenLayers
    ) -> dict[str, dict[str, Chart]]:
        layout = {_MAIN: {"model": Chart(["^flips/rate", "^flips/stall_ratio"])}}
        for suffix, of in (("", "layer"), ("_by_group", "group of layers")):
            for value in shown_as((name for name, kind in varying if kind == suffix), values):
                category = layout.setdefault(_GROUPS if suffix else value.chart or _OTHER, {})
                charts = {f"by {of}": Chart([f"^{re.escape(value.name)}{suffix}/.*"])}
                if chosen.are_many and not suffix:
                    charts = self._of_many(value.name, chosen.outliers)
                for what, chart in charts.items():
                    # Two numbers may have one title.
                    titles = (shown(f"{name}, {what}") for name in (value.description or value.title, value.name))
                    category[next(title for title in titles if title not in category)] = chart
        return layout

    def _of_many(self, value: str, outliers: list[str]) -> dict[str, Chart]:
        """No line for each layer: a band for all of them, and lines for those that stand out."""
        charts = {}
        for quantizer in self._quantizers:
            borders = (("median", "min", "max"), ("median", "p25", "p75"))
            bands = [tuple(shown(spread_tag(value, which, quantizer)) for which in band) for band in borders]
            charts[f"spread of layers{quantizer and ' @'}{quantizer}"] = Chart(bands=bands)  # type: ignore[arg-type]
        if outliers:
            medians = (spread_tag(value, "median", quantizer) for quantizer in self._quantizers)
            tags = [*(f"{value}/{layer}" for layer in outliers), *medians]
            charts["layers that stand out, and the median"] = Chart([f"^{re.escape(shown(tag))}$" for tag in tags])
        return charts


def _summary(layout: Mapping[str, Mapping[str, Chart]]) -> Summary:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    def chart_of(title: str, chart: Chart) -> Any:
        if not chart.bands:
            return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=chart.tags))
        series = [
            layout_pb2.MarginChartContent.Series(value=middle, lower=lower, upper=upper)
            for middle, lower, upper in chart.bands
        ]
        return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=series))

    categories = [
        layout_pb2.Category(title=title, chart=[chart_of(*item) for item in charts.items()])
        for title, charts in layout.items()
    ]
    text = layout_pb2.Layout(category=categories).SerializeToString()
    tensor = TensorProto(dtype="DT_STRING", string_val=[text], tensor_shape=TensorShapeProto())
    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME))
    return Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=about)])
