"""Layers whose weights move inside their cells and rarely to another code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity, late_part
from weightflip.report.findings.phrases import list_layers, percent
from weightflip.report.run import Layer, Run

# About 1 for weights spread evenly in their cells, independent of the step size.
_TRAVEL = 0.2


def find_resting(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding if quantized weights travel far less than the weights. Layers without flips are "stuck"."""
    travels = {
        layer.name: travel
        for layer in layers
        if len(layer.get("travel_ratio")) >= POINTS
        and late_part(run, layer, "flip_rate").numerators.any()
        and (travel := late_part(run, layer, "travel_ratio").summary) < _TRAVEL
    }
    if not travels:
        return
    name, travel = min(travels.items(), key=lambda item: item[1])
    text = (
        f"{list_layers(list(travels), len(run.layers))} {'rests' if len(travels) == 1 else 'rest'}: in the last "
        f"quarter, the quantized weights of {name} traveled {percent(travel)} of the distance of the weights "
        "themselves. The weights move back and forth inside their cells, and the forward pass sees little of it"
    )
    yield Finding(Severity.NOTE, "resting", text, (run.name,), tuple(travels))
