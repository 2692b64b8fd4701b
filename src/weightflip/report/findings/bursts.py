"""Windows in which far more weights flip than in those around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from weightflip.report.findings.base import Finding, Severity
from weightflip.report.findings.words import named
from weightflip.report.run import Layer, Run

# Points that a burst needs, and a sentence that nothing stands out.
BURST_POINTS = 8
# Flips of each weight in one window, beyond those of the windows around it, and the factor between the two.
_BURST, _BURST_FACTOR = 0.5, 4.0


class _Burst(NamedTuple):
    layer: str
    begin: int
    end: int
    flips: float
    usual: float


def find_bursts(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """One window in which far more weights flip than in those around it."""
    found: list[_Burst] = []
    for layer in layers:
        flips = layer.get("flip_rate")
        if len(flips) < BURST_POINTS:
            continue
        rates = flips.values
        # Tracked steps of each window. The size is unknown to event files without a text panel: there it counts as 1.
        steps = flips.denominators / max(1, layer.weights)
        padded = np.pad(rates, 3, mode="reflect")
        around = np.stack([padded[shift : shift + len(rates)] for shift in (0, 1, 2, 4, 5, 6)])
        # As high as either side goes: a warmup, or a learning rate that falls in a step, is no burst.
        usual = np.maximum(np.median(around[:3], axis=0), np.median(around[3:], axis=0))
        at = int(np.argmax((rates - usual) * steps))
        if (rates[at] - usual[at]) * steps[at] >= _BURST and rates[at] >= _BURST_FACTOR * usual[at]:
            begin, end = int(flips.steps[at - 1]) if at else run.begin, int(flips.steps[at])
            found.append(_Burst(layer.name, begin, end, float(rates[at] * steps[at]), float(usual[at] * steps[at])))
    for begin, end in dict.fromkeys((burst.begin, burst.end) for burst in found):
        bursts = [burst for burst in found if (burst.begin, burst.end) == (begin, end)]
        biggest = max(bursts, key=lambda burst: burst.flips)
        names = tuple(burst.layer for burst in bursts)
        whose = "its" if len(names) == 1 else f"{biggest.layer}'s"
        text = (
            f"A burst in {named(names, len(run.layers))} between step {begin:,} and {end:,}: {whose} weights flipped "
            f"{biggest.flips:.2f} times each, {biggest.usual:.2f} times in the windows around it. A moved scale does "
            "this, a spike of the loss, or weights that were written through .data"
        )
        yield Finding(Severity.NOTE, "burst", text, (run.name,), names, end)
