"""Weights that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import Finding, Severity
from weightflip.report.findings.phrases import list_layers
from weightflip.report.run import Layer, Run


def find_nonfinite(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding about NaN and infinite weights at any time."""
    hit = [layer for layer in run.layers.values() if len(layer.get("nonfinite_weights"))]
    if not hit:
        return
    first = min(hit, key=lambda layer: layer.get("nonfinite_weights").steps[0])
    since = int(first.get("nonfinite_weights").steps[0])
    now = [layer for layer in hit if layer.get("nonfinite_weights").steps[-1] == layer.get("flip_rate").steps[-1]]
    total = len(run.layers)
    where = list_layers([layer.name for layer in hit], total)
    order = f", first in {first.name}" if len(hit) > 1 else ""
    if now:
        count = int(sum(layer.get("nonfinite_weights").values[-1] for layer in now))
        size = sum(layer.weights for layer in now)
        amount = f"{count:,} of {size:,} weights" if size else f"{count:,} weights"
        text = (
            f"NaN or infinite weights in {where} since step {since:,}{order}: {amount} at the end. The training has "
            "diverged there, and the other numbers of these layers are meaningless from then on"
        )
    else:
        text = f"NaN or infinite weights in {where} at step {since:,}{order}; all weights were finite at the end"
    severity = Severity.SERIOUS if now else Severity.WARNING
    yield Finding(severity, "non-finite", text, (run.name,), tuple(layer.name for layer in hit), since)
