"""Syncs that do not change the weights of the rollout engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity
from weightflip.report.findings.phrases import describe_formats, list_layers
from weightflip.report.run import Layer, Run, sum_series

_MANY = 0.5


def find_empty_deltas(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield findings about empty deltas: of the whole model at some points, or of some layers at all points."""
    for variant in dict.fromkeys(layer.variant for layer in layers):
        synced = [layer for layer in layers if layer.variant == variant and len(layer.get("changed_fraction"))]
        changes = sum_series(layer.get("changed_fraction") for layer in synced)
        empty = changes.steps[changes.numerators == 0]
        if len(empty):
            when = "all" if len(empty) == len(changes) else f"{len(empty):,} of"
            points = f"{when} {len(changes):,} points with a sync" if len(changes) > 1 else "the only point with a sync"
            text = (
                f"The rollout engines would get the weights they have: at {points}, no weight changed its code "
                f"({describe_formats(synced)}) since the last sync; the last such point is at step {int(empty[-1]):,}. "
                "Sync less often, or use a learning rate that moves weights to other codes"
            )
            severity = Severity.WARNING if len(empty) >= _MANY * len(changes) else Severity.NOTE
            yield Finding(severity, "empty deltas", text, (run.name,), step=int(empty[0]))
        if len(empty) < len(changes):
            yield from _find_unchanged_layers(run, synced)


def _find_unchanged_layers(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    changes = {layer.name: layer.get("changed_fraction") for layer in layers}
    names = [name for name, series in changes.items() if len(series) >= POINTS and not series.numerators.any()]
    if names:
        text = (
            f"The deltas of {list_layers(names, len(run.layers))} are empty at all points with a sync, while other "
            "layers changed. The rollout engines still have the first published weights of these layers"
        )
        yield Finding(Severity.NOTE, "empty deltas", text, (run.name,), tuple(names))
