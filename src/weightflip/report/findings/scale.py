"""Flips that a moving scale makes, and no weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import Finding, Severity, late_part
from weightflip.report.findings.words import named, percent
from weightflip.report.run import Layer, Run

_MOST, _NEARLY_ALL = 0.5, 0.1
_FLIP_RATE = 0.02


def find_scale_driven(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Most flips, or nearly all, would not be there under the scale of the step before."""
    shares = {
        layer.name: share
        for layer in layers
        if (share := late_part(run, layer, "weight_driven_fraction").summary) < _MOST
        and late_part(run, layer, "flip_rate").summary >= _FLIP_RATE
    }
    nearly_all = {name: share for name, share in shares.items() if share < _NEARLY_ALL}
    most = {name: share for name, share in shares.items() if share >= _NEARLY_ALL}
    for how, hit, severity in (("Nearly all", nearly_all, Severity.WARNING), ("Most", most, Severity.NOTE)):
        if hit:
            name, share = min(hit.items(), key=lambda item: item[1])
            text = (
                f"{how} flips of {named(list(hit), len(run.layers))} come from a moving scale: in the last quarter "
                f"only {percent(share)} of those of {name} would be there with the scale of the step before. Read its "
                "flip rate with that in mind; a scale per row or a power of two moves less"
            )
            yield Finding(severity, "scale-driven", text, (run.name,), tuple(hit))
