"""Updates lost to rounding because no higher-precision copy of the weight is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity
from weightflip.report.findings.phrases import percent
from weightflip.report.run import Layer, Run, Series, sum_layers

# Fractions of the stored weights' updates that are lost to rounding, one per severity.
_LOST = (0.25, 0.5, 0.9)


def find_lost_updates(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding if updates do not change the stored low-precision weights."""
    stored = [layer for layer in layers if layer.is_stored and layer.dtype not in ("float32", "float64")]
    stalls = sum_layers(stored).get("stall_ratio")
    if stalls is None:
        return
    fraction, late = stalls.summary, stalls.part(run.late).summary
    severity = severity_of_losses(stalls, run.late)
    if not severity:
        return
    dtype = " and ".join(dict.fromkeys(layer.dtype for layer in stored if layer.dtype)) or "weights"
    text = (
        f"{percent(fraction)} of the updates left the stored {dtype} weight unchanged, {percent(late)} in the last "
        "quarter of the run. They are lost to rounding unless the optimizer keeps a higher-precision copy or rounds "
        "stochastically. Float32 master weights, stochastic rounding or a higher learning rate help"
    )
    names = () if len(stored) == len(run.layers) else tuple(layer.name for layer in stored)
    yield Finding(severity, "lost updates", text, (run.name,), names)


def severity_of_losses(stalls: Series, late: float) -> Severity:
    """Severity of lost updates, over the whole run or the last quarter, whichever is worse."""
    worst = max(stalls.summary, stalls.part(late).summary if len(stalls) >= POINTS else 0)
    return Severity(sum(worst >= limit for limit in _LOST))
