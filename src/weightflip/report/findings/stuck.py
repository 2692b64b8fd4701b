"""Layers in which no weight moves to another code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity, has_stall_counts, late_part
from weightflip.report.findings.phrases import describe_formats, explain_stalls, list_layers
from weightflip.report.run import Layer, Run


def _moved_last(layer: Layer) -> int:
    """Step of the last point with a flip; 0 without flips."""
    flips = layer.get("flip_rate")
    moved = flips.steps[flips.numerators > 0]
    return int(moved[-1]) if len(moved) else 0


def _stuck_layers(run: Run, layers: Sequence[Layer]) -> list[Layer]:
    return [
        layer
        for layer in layers
        if len(layer.get("flip_rate")) >= POINTS
        and len(late := late_part(run, layer, "flip_rate"))
        and not late.numerators.any()
        and (len(late_part(run, layer, "stall_ratio")) or not has_stall_counts(run))
    ]


def find_stuck(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding about layers without a flip in the last quarter."""
    hit = _stuck_layers(run, layers)
    if not hit:
        return
    names = tuple(layer.name for layer in hit)
    last = max(_moved_last(layer) for layer in hit)
    since = f"since step {last:,}" if last else "in the whole run"
    what = "update" if has_stall_counts(run) else "step"
    cause = (
        " Check whether the learning rate has reached 0"
        if len(hit) == len(layers)
        else " Its steps are too small for the distance between its codes"
        if len(hit) == 1
        else " Their steps are too small for the distance between their codes"
    )
    text = (
        f"Stuck: in {list_layers(names, len(run.layers))}, no {what} has moved a weight to another code {since} "
        f"({describe_formats(hit)}). {explain_stalls(hit)}.{cause}"
    )
    # A decayed learning rate stops a coarse format some time before the end. Finer master weights lose nothing.
    long = run.end - last >= (run.end - run.begin) / 2
    severity = Severity.WARNING if long else Severity.NOTE
    if all(layer.is_stored for layer in hit):
        severity = Severity.SERIOUS
    yield Finding(severity, "stuck", text, (run.name,), names, last)
