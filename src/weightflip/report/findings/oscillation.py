"""Layers whose weights move back and forth between codes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity, late_part
from weightflip.report.findings.phrases import format_factor, list_layers, percent
from weightflip.report.run import Layer, Run

# Thresholds for the fraction of flips that reverse the previous one, for the flip rate, and for the travel ratio. In
# healthy 8-bit training, 20 to 50 % of the flips reverse the previous one, and half of the weights have an oscillation
# frequency above the threshold of Nagel et al.
_OSCILLATION_RATIO, _OSCILLATION_RATE, _TRAVEL = 0.9, 0.003, 3.0


def find_oscillating(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding about layers with many flips of which nearly all reverse the previous one."""
    hit: dict[str, tuple[float, str]] = {}
    for layer in layers:
        rate, back, travel, fraction, net = (
            late_part(run, layer, value).summary
            for value in ("flip_rate", "oscillation_ratio", "travel_ratio", "oscillating_fraction", "net_flipped")
        )
        few = len(layer.get("flip_rate")) < POINTS
        if few or not (back >= _OSCILLATION_RATIO and rate >= _OSCILLATION_RATE) or travel < _TRAVEL:
            continue
        clauses = [
            f"{percent(back)} of its flips reversed the previous flip",
            f"{percent(rate)} of its weights flipped per step",
        ]
        if not math.isnan(fraction):
            clauses.append(f"{percent(fraction)} of them moved back and forth shortly before the end")
        if not math.isnan(travel):
            clauses.append(
                f"its quantized weights traveled {format_factor(travel)} times as far as the weights themselves"
            )
        flips = layer.get("cumulative_flip_rate").summary
        if flips > 1 and not math.isnan(net):
            clauses.append(
                f"{format_factor(flips)} flips per weight since the start left {percent(1 - net)} of them on their "
                "first code"
            )
        hit[layer.name] = back, ", ".join(clauses)
    if not hit:
        return
    name = max(hit, key=lambda name: hit[name][0])
    as_in = f", most of all {name}" if len(hit) > 1 else ""
    text = (
        f"{list_layers(list(hit), len(run.layers))} {'oscillates' if len(hit) == 1 else 'oscillate'}{as_in}: in the "
        f"last quarter, {hit[name][1]}. A lower learning rate at the end, dampening, or freezing these weights helps"
    )
    yield Finding(Severity.WARNING, "oscillating", text, (run.name,), tuple(hit))
