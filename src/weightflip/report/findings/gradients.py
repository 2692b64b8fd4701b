"""Layers in which only a few weights get a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import Finding, Severity, late_part
from weightflip.report.findings.phrases import list_layers, percent
from weightflip.report.run import Layer, Run

# Fractions of the weights. An embedding with many rows is often below the first.
_FEW, _VERY_FEW = 0.01, 0.001


def find_few_gradients(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding if nearly all weights of a layer have a gradient of exactly 0. If all have, it is "dead"."""
    fractions = {layer.name: fraction for layer in layers if 0 < (fraction := _updated_fraction(run, layer)) < _FEW}
    if not fractions:
        return
    name, fraction = min(fractions.items(), key=lambda item: item[1])
    weights = run.layers[name].weights
    count = fraction * weights
    amount = f"{count:,.0f}" if count >= 0.5 else "less than 1"
    also = (
        ""
        if len(fractions) == 1
        else f"; {list_layers(list(fractions), len(run.layers))} have gradients for less than 1 %"
    )
    text = (
        f"{amount} of {weights:,} weights of {name} had a gradient per step in the last quarter ({percent(fraction)})"
        f"{also}. This is normal for embeddings whose rows are rarely used. In other layers it means that nearly all "
        "weights do not move: the backward pass passes the gradient to the largest weight only, or units are always 0"
    )
    severity = Severity.WARNING if fraction < _VERY_FEW else Severity.NOTE
    yield Finding(severity, "few gradients", text, (run.name,), tuple(fractions))


def _updated_fraction(run: Run, layer: Layer) -> float:
    """Weights with a gradient / weights, per step; NaN if unknown."""
    if len(counted := late_part(run, layer, "updated_fraction")):
        return counted.summary
    updates, weights = (late_part(run, layer, value).denominators for value in ("stall_ratio", "flip_rate"))
    return float(updates.sum() / weights.sum()) if layer.weights and len(weights) and weights.sum() else math.nan
