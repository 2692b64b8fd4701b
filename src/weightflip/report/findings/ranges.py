"""Too many weights at 0 or at the ends of the format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity
from weightflip.report.findings.phrases import list_layers, percent
from weightflip.report.run import Layer, Run

_ALL_ZERO = 0.9
_UNDERFLOW = 0.5
# A thirtieth of evenly spread weights, and at least as many in blocks of 32, have the two outermost codes of float8. A
# smaller fraction than this is significant only if it grows.
_SATURATED = 0.1
_SATURATING, _GROWTH = 0.01, 3.0
# Formats with so few codes that, by design, many weights have the largest one and many round to 0.
_COARSE = ("ternary", "binary", "int", "mxfp4", "nvfp4", "e0m", "e1m", "e2m1", "e3m0", "e2m0")


def find_zeros(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding if nearly all weights are 0 in the forward pass."""
    hit = _above(layers, "zero_fraction", _ALL_ZERO)
    advice = "The layer is dying, or its scale follows a few outliers"
    yield from _finding(run, "zero", hit, "is 0 in the forward pass", advice)


def find_underflow(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding if many weights round to 0 in a format with many codes."""
    hit = _above(_fine(layers), "underflow_fraction", _UNDERFLOW)
    advice = "A scale per row or block, or a format with more exponent bits, preserves small weights"
    yield from _finding(run, "underflow", hit, "is nonzero but rounds to 0", advice)


def find_saturated(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield findings if many weights have the outermost codes of a format with many codes, or more and more do."""
    hit = _above(_fine(layers), "saturated_fraction", _SATURATED)
    advice = "A larger scale, or a scale per row or block, distinguishes large weights"
    yield from _finding(run, "saturated", hit, "is at the ends of the format", advice)
    growing = {
        layer.name: fraction
        for layer in _fine(layers)
        if layer.name not in hit
        and len(series := layer.get("saturated_fraction")) >= POINTS
        and (fraction := series.summary) >= max(_SATURATING, _GROWTH * series.values[0])
    }
    if growing:
        name, fraction = max(growing.items(), key=lambda item: item[1])
        first = run.layers[name].get("saturated_fraction")
        text = (
            f"The fraction of {list_layers(list(growing), len(run.layers))} at the ends of the format grows: for "
            f"{name}, from {percent(first.values[0])} at step {first.steps[0]:,} to {percent(fraction)} at the end. "
            f"The scale does not follow the weights. {advice}"
        )
        yield Finding(Severity.WARNING, "saturating", text, (run.name,), tuple(growing))


def _fine(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if not layer.grid.startswith(_COARSE)]


def _above(layers: Sequence[Layer], value: str, limit: float) -> dict[str, float]:
    return {layer.name: fraction for layer in layers if (fraction := layer.get(value).summary) >= limit}


def _finding(run: Run, rule: str, hit: Mapping[str, float], what: str, advice: str) -> Iterator[Finding]:
    if not hit:
        return
    name, fraction = max(hit.items(), key=lambda item: item[1])
    others = f", and many weights of {list_layers(list(hit), len(run.layers))}" if len(hit) > 1 else ""
    text = f"{percent(fraction)} of {name} {what} at the end{others}. {advice}"
    yield Finding(Severity.WARNING, rule, text, (run.name,), tuple(hit))
