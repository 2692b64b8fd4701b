"""Alerts that were given during the training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import Finding, Severity
from weightflip.report.run import Layer, Run


def find_alerts(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Alerts of one layer and rule are one finding."""
    alerts = sorted(run.alerts, key=lambda alert: (alert.layer, alert.rule))
    for (layer, rule), group in itertools.groupby(alerts, key=lambda alert: (alert.layer, alert.rule)):
        first, *later = sorted(group)
        again = f" (and {len(later)} times more, last at step {later[-1].step:,})" if later else ""
        where = f" for {layer}" if layer else ""
        text = f"Alert at step {first.step:,}{where}: {first.message or rule}{again}"
        names = (layer,) if layer in run.layers else ()
        yield Finding(Severity.WARNING, "alert", text, (run.name,), names, first.step)
