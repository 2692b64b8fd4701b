"""Flips caused by a changing scale instead of changing weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import Finding, Severity, late_part
from weightflip.report.findings.phrases import list_layers, percent
from weightflip.report.run import Layer, Run

_MOST, _NEARLY_ALL = 0.5, 0.1
_FLIP_RATE = 0.02


def find_scale_driven(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield findings if most or nearly all flips would not occur with the scale of the previous step."""
    fractions = {
        layer.name: fraction
        for layer in layers
        if (fraction := late_part(run, layer, "weight_driven_fraction").summary) < _MOST
        and late_part(run, layer, "flip_rate").summary >= _FLIP_RATE
    }
    nearly_all = {name: fraction for name, fraction in fractions.items() if fraction < _NEARLY_ALL}
    most = {name: fraction for name, fraction in fractions.items() if fraction >= _NEARLY_ALL}
    for how, hit, severity in (("Nearly all", nearly_all, Severity.WARNING), ("Most", most, Severity.NOTE)):
        if hit:
            name, fraction = min(hit.items(), key=lambda item: item[1])
            text = (
                f"{how} flips of {list_layers(list(hit), len(run.layers))} come from a changing scale: in the last "
                f"quarter, only {percent(fraction)} of those of {name} would occur with the scale of the previous "
                "step. Read its flip rate with this in mind. Scales per row, or powers of two, change less"
            )
            yield Finding(severity, "scale-driven", text, (run.name,), tuple(hit))
