"""Too many weights at the ends of the format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from weightflip.report.findings.base import Finding, Severity
from weightflip.report.findings.words import named, percent
from weightflip.report.run import Layer, Run

_ALL_ZERO = 0.9
_UNDERFLOW = 0.5
# Of evenly spread weights a thirtieth have the outermost two codes of float8.
_SATURATED = 0.1
# Formats of so few codes that many weights are at the largest one, and many round to 0, by design.
_COARSE = ("ternary", "binary", "int", "mxfp4", "nvfp4", "e0m", "e1m", "e2m1", "e3m0", "e2m0")


def find_out_of_range(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Too many weights at the ends of the format."""
    coarse = {layer.name for layer in layers if layer.grid.startswith(_COARSE)}

    def above(value: str, limit: Callable[[Layer], float]) -> dict[str, float]:
        shares = {layer.name: layer.get(value).summary for layer in layers}
        return {name: share for name, share in shares.items() if share >= limit(run.layers[name])}

    checks = [
        ("zero", above("zero_fraction", lambda layer: _ALL_ZERO), "is 0 in the forward pass"),
        (
            "underflow",
            above("underflow_fraction", lambda layer: math.inf if layer.name in coarse else _UNDERFLOW),
            "is not 0 and rounds to 0",
        ),
        (
            "saturated",
            above("saturated_fraction", lambda layer: math.inf if layer.name in coarse else _SATURATED),
            "sits at the ends of the format",
        ),
    ]
    for rule, hit, what in checks:
        if hit:
            name, share = max(hit.items(), key=lambda item: item[1])
            advice = {
                "zero": "The layer is dying out, or its scale follows a few outliers",
                "underflow": "A scale per row or block, or a format with more exponent bits, keeps small weights",
                "saturated": "A larger scale, or a scale per row or block, keeps large weights apart",
            }[rule]
            text = (
                f"{percent(share)} of {name} {what} at the end"
                + (f", and many weights of {named(list(hit), len(run.layers))}" if len(hit) > 1 else "")
                + f". {advice}"
            )
            yield Finding(Severity.WARNING, rule, text, (run.name,), tuple(hit))
