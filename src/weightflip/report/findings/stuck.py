"""Layers of which no weight moves to another code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity, counts_stalls, late_part
from weightflip.report.findings.words import formats_of, named, what_becomes_of_it
from weightflip.report.run import Layer, Run


def _moved_last(layer: Layer) -> int:
    """The step of the last point with a flip; 0 for none."""
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
        and (len(late_part(run, layer, "stall_ratio")) or not counts_stalls(run))
    ]


def find_stuck(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """No flip at all in the last quarter."""
    hit = _stuck_layers(run, layers)
    if not hit:
        return
    names = tuple(layer.name for layer in hit)
    last = max(_moved_last(layer) for layer in hit)
    since = f"since step {last:,}" if last else "in the whole run"
    what = "update" if counts_stalls(run) else "step"
    ended = (
        " Has the learning rate come to 0?"
        if len(hit) == len(layers)
        else " Its steps are too small for the distance of its codes"
        if len(hit) == 1
        else " Their steps are too small for the distance of their codes"
    )
    text = (
        f"Stuck: no {what} of {named(names, len(run.layers))} has moved a weight to another code {since} "
        f"({formats_of(hit)}). {what_becomes_of_it(hit)}.{ended}"
    )
    # A learning rate that has decayed stops a coarse format a while before the end: no loss where weights are finer.
    long = run.end - last >= (run.end - run.begin) / 2
    severity = Severity.WARNING if long else Severity.NOTE
    if all(layer.is_stored for layer in hit):
        severity = Severity.SERIOUS
    yield Finding(severity, "stuck", text, (run.name,), names, last)
