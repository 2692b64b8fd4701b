"""Steps that are small compared with the distance between codes, in most layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from weightflip.report.findings.base import POINTS, Finding, Severity, late_part
from weightflip.report.findings.phrases import describe_formats, format_factor, list_layers, percent
from weightflip.report.run import Layer, Run

# Fraction of updates that change a code: for stored weights, where the other updates are lost; and for master weights,
# where they normally accumulate, together with the flips per weight in the whole run.
_LOST, _ADDED_UP, _FLIPS = 0.1, 0.001, 0.01


def find_small_steps(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding if, in most layers, almost no update changes a code and the rest is lost or hardly adds up."""
    moved = {
        layer.name: fraction
        for layer in layers
        if len(late_part(run, layer, "stall_ratio")) >= POINTS // 2
        and not math.isnan(fraction := 1 - late_part(run, layer, "stall_ratio").summary)
    }
    hit = [layer for layer in layers if 0 < moved.get(layer.name, math.nan) < _limit(layer)]
    if len(run.steps) < POINTS or 2 * len(hit) <= len(moved):
        return
    fraction = float(np.median([moved[layer.name] for layer in hit]))
    text = (
        f"The steps of {list_layers([layer.name for layer in hit], len(run.layers))} are small compared with the "
        f"distance between codes ({describe_formats(hit)}): in the last quarter, {percent(fraction)} of their "
        f"updates moved a weight to another code (median of these layers). Steps at least "
        f"{format_factor(0.5 / fraction)} times as large would move half of them"
    )
    yield Finding(Severity.WARNING, "small steps", text, (run.name,), tuple(layer.name for layer in hit))


def _limit(layer: Layer) -> float:
    if layer.is_stored:
        return _LOST
    return _ADDED_UP if layer.get("cumulative_flip_rate").summary < _FLIPS else 0.0
