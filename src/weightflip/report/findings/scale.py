"""Flips that a moving scale makes, and no weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import Finding, Severity, late_part
from weightflip.report.findings.words import named, percent
from weightflip.report.run import Layer, Run

_SCALE_DRIVEN, _SCALE_DRIVEN_RATE = 0.5, 0.02


def find_scale_driven(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Most flips would not be there under the scale of the step before."""
    shares = {
        layer.name: share
        for layer in layers
        if (share := late_part(run, layer, "weight_driven_fraction").summary) < _SCALE_DRIVEN
        and late_part(run, layer, "flip_rate").summary >= _SCALE_DRIVEN_RATE
    }
    if shares:
        name, share = min(shares.items(), key=lambda item: item[1])
        text = (
            f"Most flips of {named(list(shares), len(run.layers))} come from a moving scale: in the last quarter only "
            f"{percent(share)} of those of {name} would be there with the scale of the step before. Read its flip "
            "rate with that in mind; a scale per row or a power of two moves less"
        )
        yield Finding(Severity.NOTE, "scale-driven", text, (run.name,), tuple(shares))
