"""Windows in which far more weights flip than in neighboring windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from weightflip.report.findings.base import Finding, Severity
from weightflip.report.findings.phrases import list_layers
from weightflip.report.run import Layer, Run

# Minimum number of points for a burst, and for a reliable statement that nothing stands out.
BURST_POINTS = 8
# Flips per weight in one window in excess of the windows around it, and the factor between the two.
_BURST, _BURST_FACTOR = 0.5, 4.0


class _Burst(NamedTuple):
    layer: str
    begin: int
    end: int
    flips: float
    usual: float


def find_bursts(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield findings about single windows in which far more weights flip than in the windows around them."""
    found: list[_Burst] = []
    for layer in layers:
        flips = layer.get("flip_rate")
        if len(flips) < BURST_POINTS:
            continue
        rates = flips.values
        # Tracked steps of each window. Event files without a text panel do not tell the layer size, which counts as 1.
        steps = flips.denominators / max(1, layer.weights)
        padded = np.pad(rates, 3, mode="reflect")
        around = np.stack([padded[shift : shift + len(rates)] for shift in (0, 1, 2, 4, 5, 6)])
        # The higher side: a warmup, or a step-wise drop of the learning rate, is not a burst.
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
            f"A burst of flips in {list_layers(names, len(run.layers))} between steps {begin:,} and {end:,}: {whose} "
            f"weights flipped {biggest.flips:.2f} times each, compared with {biggest.usual:.2f} times in the windows "
            "around it. Possible causes are a changed scale, a loss spike, or weights that were written through .data"
        )
        yield Finding(Severity.NOTE, "burst", text, (run.name,), names, end)
