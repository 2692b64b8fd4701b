"""Points of records, collected into series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from weightflip.records import LayerRecord, RunInfo, split_variant
from weightflip.report.run import Layer, Series, gauges_of


@dataclass
class Table:
    """Collects points, layer by layer and value by value."""

    points: dict[str, dict[str, list[tuple[float, float, float]]]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    gauges: dict[str, None] = field(default_factory=dict)
    left_out: int = 0

    def add(self, step: int, layer: LayerRecord) -> None:
        rows = self.points.setdefault(layer.name, {})
        self.weights[layer.name] = layer.weights
        self.gauges.update(dict.fromkeys(layer.gauges))
        for name, quotient in layer.quotients.items():
            if all(map(math.isfinite, (*quotient, quotient.value))):
                rows.setdefault(name, []).append((step, *quotient))
            else:
                self.left_out += 1
        if layer.nonfinite:
            rows.setdefault("nonfinite_weights", []).append((step, layer.nonfinite, 1))

    def layers(self, info: RunInfo) -> dict[str, Layer]:
        found = {}
        gauges = gauges_of(info)
        for name, rows in self.points.items():
            _, dtype, quantizer = info.tracked.get(name, ("", "", split_variant(name)[1]))
            values = {value: _series(points, value in gauges) for value, points in rows.items()}
            found[name] = Layer(name, self.weights[name], dtype, quantizer, values)
        return found


def _series(points: Sequence[tuple[float, float, float]], gauge: bool) -> Series:
    steps, numerators, denominators = np.array(points, dtype=np.float64).reshape(-1, 3).T
    return Series(steps.astype(np.int64), numerators, denominators, gauge)
