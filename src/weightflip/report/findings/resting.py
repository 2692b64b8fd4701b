"""Layers whose weights move inside their cells, and seldom to another code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity, late_part
from weightflip.report.findings.words import named, percent
from weightflip.report.run import Layer, Run

# Of weights that are spread evenly in their cells it is about 1, whatever the steps.
_TRAVEL = 0.2


def find_resting(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """The quantized weights travel far less than the weights; where they do not move at all, they are stuck."""
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
        f"{named(list(travels), len(run.layers))} {'rests' if len(travels) == 1 else 'rest'}: in the last quarter the "
        f"quantized weights of {name} travelled {percent(travel)} of the way of the weights themselves. These move "
        "inside their cells, to and fro, and the forward pass sees little of it"
    )
    yield Finding(Severity.NOTE, "resting", text, (run.name,), tuple(travels))
