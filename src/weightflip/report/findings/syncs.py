"""Syncs that publish the weights that the rollout engines have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity
from weightflip.report.findings.words import formats_of, named
from weightflip.report.run import Layer, Run, total

_MANY = 0.5


def find_empty_deltas(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """No weight has another code than at the sync before: in none of the layers, or in some of them all the time."""
    for variant in dict.fromkeys(layer.variant for layer in layers):
        seen = [layer for layer in layers if layer.variant == variant and len(layer.get("changed_fraction"))]
        changes = total(layer.get("changed_fraction") for layer in seen)
        empty = changes.steps[changes.numerators == 0]
        if len(empty):
            when = "all" if len(empty) == len(changes) else f"{len(empty):,} of"
            points = f"{when} {len(changes):,} points with a sync" if len(changes) > 1 else "the one point with a sync"
            text = (
                f"The rollout engines would get the weights that they have: at {points}, no weight has another code "
                f"({formats_of(seen)}) than at the sync before, at step {int(empty[-1]):,} the last time. Sync less "
                "often, or take larger steps for the distance of these codes"
            )
            severity = Severity.WARNING if len(empty) >= _MANY * len(changes) else Severity.NOTE
            yield Finding(severity, "empty deltas", text, (run.name,), step=int(empty[0]))
        if len(empty) < len(changes):
            yield from _still(run, seen)


def _still(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    changes = {layer.name: layer.get("changed_fraction") for layer in layers}
    names = [name for name, of in changes.items() if len(of) >= POINTS and not of.numerators.any()]
    if names:
        text = (
            f"Between no two syncs a weight of {named(names, len(run.layers))} changed its code, while others did. "
            "The rollout engines have these weights from the beginning"
        )
        yield Finding(Severity.NOTE, "empty deltas", text, (run.name,), tuple(names))
