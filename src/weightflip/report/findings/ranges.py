"""Too many weights at the ends of the format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity
from weightflip.report.findings.words import named, percent
from weightflip.report.run import Layer, Run

_ALL_ZERO = 0.9
_UNDERFLOW = 0.5
# Of evenly spread weights a thirtieth have the outermost two codes of float8, and of blocks of 32 at least as many: a
# smaller share than this says something only where it grows.
_SATURATED = 0.1
_SATURATING, _GROWTH = 0.01, 3.0
# Formats of so few codes that many weights are at the largest one, and many round to 0, by design.
_COARSE = ("ternary", "binary", "int", "mxfp4", "nvfp4", "e0m", "e1m", "e2m1", "e3m0", "e2m0")


def find_zeros(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Nearly all weights are 0 in the forward pass."""
    hit = _above(layers, "zero_fraction", _ALL_ZERO)
    advice = "The layer is dying out, or its scale follows a few outliers"
    yield from _finding(run, "zero", hit, "is 0 in the forward pass", advice)


def find_underflow(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Many weights round to 0, in a format of many codes."""
    hit = _above(_fine(layers), "underflow_fraction", _UNDERFLOW)
    advice = "A scale per row or block, or a format with more exponent bits, keeps small weights"
    yield from _finding(run, "underflow", hit, "is not 0 and rounds to 0", advice)


def find_saturated(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Many weights have the outermost codes of a format of many codes, or ever more of them."""
    hit = _above(_fine(layers), "saturated_fraction", _SATURATED)
    advice = "A larger scale, or a scale per row or block, keeps large weights apart"
    yield from _finding(run, "saturated", hit, "sits at the ends of the format", advice)
    growing = {
        layer.name: share
        for layer in _fine(layers)
        if layer.name not in hit
        and len(series := layer.get("saturated_fraction")) >= POINTS
        and (share := series.summary) >= max(_SATURATING, _GROWTH * series.values[0])
    }
    if growing:
        name, share = max(growing.items(), key=lambda item: item[1])
        first = run.layers[name].get("saturated_fraction")
        text = (
            f"The share of {named(list(growing), len(run.layers))} at the ends of the format grows: of {name}, from "
            f"{percent(first.values[0])} at step {first.steps[0]:,} to {percent(share)} at the end. The scale does not "
            f"follow the weights. {advice}"
        )
        yield Finding(Severity.WARNING, "saturating", text, (run.name,), tuple(growing))


def _fine(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if not layer.grid.startswith(_COARSE)]


def _above(layers: Sequence[Layer], value: str, limit: float) -> dict[str, float]:
    return {layer.name: share for layer in layers if (share := layer.get(value).summary) >= limit}


def _finding(run: Run, rule: str, hit: Mapping[str, float], what: str, advice: str) -> Iterator[Finding]:
    if not hit:
        return
    name, share = max(hit.items(), key=lambda item: item[1])
    others = f", and many weights of {named(list(hit), len(run.layers))}" if len(hit) > 1 else ""
    text = f"{percent(share)} of {name} {what} at the end{others}. {advice}"
    yield Finding(Severity.WARNING, rule, text, (run.name,), tuple(hit))
