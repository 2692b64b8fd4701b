"""Layers without a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import Finding, Severity, has_stall_counts, late_part
from weightflip.report.findings.phrases import list_layers
from weightflip.report.run import Layer, Run


def find_dead(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield findings about layers without a gradient."""
    if "stalls" not in run.info.settings.get("metrics", "stalls"):
        return
    late = [layer for layer in layers if len(late_part(run, layer, "flip_rate"))]
    without_gradient = [layer for layer in late if not len(late_part(run, layer, "stall_ratio"))]
    if not without_gradient:
        return
    total = len(run.layers)
    if len(without_gradient) == len(late) and not has_stall_counts(run):
        text = (
            "No gradients were available at the end of any step, so there is no stall ratio. Something zeroes or frees "
            "the gradients inside step()"
        )
        if any(late_part(run, layer, "flip_rate").numerators.any() for layer in late):
            yield Finding(Severity.INFO, "no gradients", text, (run.name,))
            return
    for moves in (False, True):
        hit = [
            layer for layer in without_gradient if bool(late_part(run, layer, "flip_rate").numerators.any()) is moves
        ]
        if not hit:
            continue
        names = tuple(layer.name for layer in hit)
        last = max(int(steps[-1]) if len(steps := layer.get("stall_ratio").steps) else 0 for layer in hit)
        since = f"since step {last:,}" if last else "in the whole run"
        if moves:
            severity = Severity.NOTE
            text = (
                f"No gradient for {list_layers(names, total)} {since}, but weights change, because of weight decay or "
                "momentum"
            )
        else:
            severity = Severity.WARNING
            text = (
                f"Dead: no gradient for {list_layers(names, total)} {since}, and no weight changed. Check that it is "
                "used in the forward pass, not detached, and not behind units that are always 0"
            )
        yield Finding(severity, "dead", text, (run.name,), names, last or None)
