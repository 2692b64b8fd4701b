"""Layers whose updates change codes far less often than those of the other layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from weightflip.report.findings.base import POINTS, Finding, Severity, late_part
from weightflip.report.findings.phrases import list_layers, percent
from weightflip.report.run import Layer, Run

# Updates of a lagging layer change codes this many times less often than those of the other layers.
_FACTOR = 20.0


def find_lagging(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield findings about layers whose updates change codes far less often than those in the same format."""
    if len(run.steps) < POINTS:
        return
    for variant, grid in dict.fromkeys((layer.variant, layer.grid) for layer in layers):
        moved = {
            layer.name: 1 - stalls.summary
            for layer in layers
            if (layer.variant, layer.grid) == (variant, grid) and len(stalls := late_part(run, layer, "stall_ratio"))
        }
        others = {
            name: float(np.median([fraction for other, fraction in moved.items() if other != name]))
            for name in (moved if len(moved) > 1 else ())
        }
        hit = {name: moved[name] for name, middle in others.items() if 0 < moved[name] < middle / _FACTOR}
        if not hit:
            continue
        name, fraction = min(hit.items(), key=lambda item: item[1])
        ever = late_part(run, run.layers[name], "ever_flipped").summary
        excess = late_part(run, run.layers[name], "flip_excess").summary
        clauses = "" if math.isnan(ever) else f"; {percent(ever)} of its weights have flipped since the start"
        cause = "Check its gradients, its learning rate and its scale"
        if 0.5 <= excess <= 2:
            cause = f"Its steps are small (flip excess {excess:.2f}): check its learning rate and its gradients"
        text = (
            f"{list_layers(list(hit), len(run.layers))} hardly {'moves' if len(hit) == 1 else 'move'}: in the last "
            f"quarter, {percent(fraction)} of the updates of {name} changed a code, compared with "
            f"{percent(others[name])} in the other layers{clauses}. {cause}"
        )
        yield Finding(Severity.WARNING, "lagging", text, (run.name,), tuple(hit))
