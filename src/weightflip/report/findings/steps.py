"""Steps that are small beside the distance of two codes, in most layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from weightflip.report.findings.base import POINTS, Finding, Severity, late_part
from weightflip.report.findings.words import formats_of, named, percent, times
from weightflip.report.run import Layer, Run

# Updates that move a code, where each of the others is lost; and where they add up in finer weights, which is usual,
# with the flips of a weight in the whole run.
_LOST, _ADDED_UP, _FLIPS = 0.1, 0.001, 0.01


def find_small_steps(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """In most layers nearly no update moves a code, and what does not is lost, or has hardly added up to anything."""
    moved = {
        layer.name: share
        for layer in layers
        if len(late_part(run, layer, "stall_ratio")) >= POINTS // 2
        and not math.isnan(share := 1 - late_part(run, layer, "stall_ratio").summary)
    }
    hit = [layer for layer in layers if 0 < moved.get(layer.name, math.nan) < _limit(layer)]
    if len(run.steps) < POINTS or 2 * len(hit) <= len(moved):
        return
    share = float(np.median([moved[layer.name] for layer in hit]))
    text = (
        f"The steps of {named([layer.name for layer in hit], len(run.layers))} are small beside the distance of two "
        f"codes ({formats_of(hit)}): in the last quarter {percent(share)} of their updates moved a weight to "
        f"another code (median of these layers). Steps at least {times(0.5 / share)} times as large would move half of "
        "them"
    )
    yield Finding(Severity.WARNING, "small steps", text, (run.name,), tuple(layer.name for layer in hit))


def _limit(layer: Layer) -> float:
    if layer.is_stored:
        return _LOST
    return _ADDED_UP if layer.get("cumulative_flip_rate").summary < _FLIPS else 0.0
