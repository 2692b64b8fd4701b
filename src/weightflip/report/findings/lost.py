"""Updates that rounding swallows, where no finer copy of the weight is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity
from weightflip.report.findings.words import percent
from weightflip.report.run import Layer, Run, Series, sums

# Shares of the stored weights' updates that rounding swallows: a part, half, nearly all.
_LOST = (0.25, 0.5, 0.9)


def find_lost_updates(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Updates that leave a weight of few bits as it was, where no finer copy is kept."""
    stored = [layer for layer in layers if layer.is_stored and layer.dtype not in ("float32", "float64")]
    stalls = sums(stored).get("stall_ratio")
    if stalls is None:
        return
    share, late = stalls.summary, stalls.part(run.late).summary
    severity = severity_of(stalls, run.late)
    if not severity:
        return
    dtype = " and ".join(dict.fromkeys(layer.dtype for layer in stored if layer.dtype)) or "weights"
    text = (
        f"{percent(share)} of the updates left the stored {dtype} weight as it was, {percent(late)} in the last "
        "quarter of the run: rounding swallowed them, and they are lost unless the optimizer keeps a finer copy or "
        "rounds stochastically. Float32 master weights, stochastic rounding or a higher learning rate help"
    )
    names = () if len(stored) == len(run.layers) else tuple(layer.name for layer in stored)
    yield Finding(severity, "lost updates", text, (run.name,), names)


def severity_of(stalls: Series, late: float) -> Severity:
    """How bad it is that so many updates are lost: over all, or in the last quarter."""
    worst = max(stalls.summary, stalls.part(late).summary if len(stalls) >= POINTS else 0)
    return Severity(sum(worst >= limit for limit in _LOST))
