"""Layers whose weights go to and fro between codes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity, late_part
from weightflip.report.findings.words import named, percent, times
from weightflip.report.run import Layer, Run

# Flips that take back the one before, and how many flips there have to be. In healthy trainings in 8 bits a fifth to
# half of the flips do, and half of the weights have an oscillation frequency above the threshold of Nagel et al.
_OSCILLATION_RATIO, _OSCILLATION_RATE, _TRAVEL = 0.9, 0.003, 3.0


def find_oscillating(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Many flips, and nearly all of them back to where the weight came from."""
    hit: dict[str, tuple[float, str]] = {}
    for layer in layers:
        rate, back, travel, share, net = (
            late_part(run, layer, value).summary
            for value in ("flip_rate", "oscillation_ratio", "travel_ratio", "oscillating_fraction", "net_flipped")
        )
        few = len(layer.get("flip_rate")) < POINTS
        if few or not (back >= _OSCILLATION_RATIO and rate >= _OSCILLATION_RATE) or travel < _TRAVEL:
            continue
        clauses = [
            f"{percent(back)} of its flips took back the flip before",
            f"{percent(rate)} of its weights flipped in a step",
        ]
        if not math.isnan(share):
            clauses.append(f"{percent(share)} of them went to and fro not long before the end")
        if not math.isnan(travel):
            clauses.append(f"its quantized weights travelled {times(travel)} times as far as the weights themselves")
        flips = layer.get("cumulative_flip_rate").summary
        if flips > 1 and not math.isnan(net):
            clauses.append(
                f"{times(flips)} flips a weight since the start left {percent(1 - net)} of them on their first code"
            )
        hit[layer.name] = back, ", ".join(clauses)
    if not hit:
        return
    name = max(hit, key=lambda name: hit[name][0])
    as_in = f", most of all {name}" if len(hit) > 1 else ""
    text = (
        f"{named(list(hit), len(run.layers))} {'oscillates' if len(hit) == 1 else 'oscillate'}{as_in}: in the last "
        f"quarter {hit[name][1]}. A lower learning rate at the end, dampening, or freezing such weights helps"
    )
    yield Finding(Severity.WARNING, "oscillating", text, (run.name,), tuple(hit))
