"""Layers of which only a few weights get a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import Finding, Severity, late_part
from weightflip.report.findings.words import named, percent
from weightflip.report.run import Layer, Run

# Shares of the weights. An embedding with many rows is often below the first.
_FEW, _HARDLY_ANY = 0.01, 0.001


def find_few_gradients(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Nearly all weights of a layer have a gradient of exactly 0; where all have, it is dead."""
    shares = {layer.name: share for layer in layers if 0 < (share := _share(run, layer)) < _FEW}
    if not shares:
        return
    name, share = min(shares.items(), key=lambda item: item[1])
    weights = run.layers[name].weights
    count = share * weights
    amount = f"{count:,.0f}" if count >= 0.5 else "less than 1"
    also = "" if len(shares) == 1 else f"; {named(list(shares), len(run.layers))} have gradients for less than 1 %"
    text = (
        f"{amount} of {weights:,} weights of {name} had a gradient in a step of the last quarter ({percent(share)})"
        f"{also}. Embeddings whose rows are rarely used look like this. In another layer nearly all weights stand "
        "still: a backward pass that gives the gradient to the largest weight alone, or units that are always 0"
    )
    severity = Severity.WARNING if share < _HARDLY_ANY else Severity.NOTE
    yield Finding(severity, "few gradients", text, (run.name,), tuple(shares))


def _share(run: Run, layer: Layer) -> float:
    """Weights with a gradient / weights, in a step; NaN where a run has no counts."""
    updates, weights = (late_part(run, layer, value).denominators for value in ("stall_ratio", "flip_rate"))
    return float(updates.sum() / weights.sum()) if layer.weights and len(weights) and weights.sum() else math.nan
